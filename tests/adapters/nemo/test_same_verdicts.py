"""The embedded guard says the same through NeMo as by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.nemo import REFUSAL, build, user

from rsafe_plugins import Content, Guard
from rsafe_plugins.backends import shared_backend

pytestmark = pytest.mark.engine

INPUTS = Path(__file__).parents[3] / "examples" / "data" / "demo_inputs.jsonl"
PROMPTS = [
    item["text"]
    for item in map(json.loads, INPUTS.read_text("utf-8").splitlines())
    if item["kind"] == "prompt"
]


async def test_attacks_and_harmless_questions_get_the_same_verdicts() -> None:
    backend = shared_backend("embedded")
    app = build("{input: {flows: [rsafe check input]}}")
    app.guard_with(backend, policy="rsafe-18", reasoning="never")
    guard = Guard("rsafe-18", backend=backend, reasoning="never")
    verdicts = await guard.acheck_many([Content.prompt(text) for text in PROMPTS])
    refused = [await app.reply(user(text)) == REFUSAL for text in PROMPTS]
    assert refused == [verdict.blocked for verdict in verdicts]
    assert 0 < sum(refused) < len(refused)
