"""What a trace shows of a rail."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.nemo import ANSWER, BOTH, REFUSAL, THOUGHT, build, user

from rsafe_plugins.testing import ScriptedBackend

QUESTION = "How is the sea?"


async def spans_of(backend: ScriptedBackend, reply: str) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = build(BOTH)
    app.guard_with(backend, policy="rsafe-18", reasoning="adaptive", on_error="block")
    with provider.get_tracer("test").start_as_current_span("request"):
        assert await app.reply(user(QUESTION)) == reply
    return list(exporter.get_finished_spans())


async def test_a_verdict_is_an_event_of_the_callers_span() -> None:
    text = f"<think>{THOUGHT}</think>\\boxed{{unsafe}}\nCategories: U9"
    (span,) = await spans_of(ScriptedBackend(text, model="a-guard"), REFUSAL)
    (event,) = (event for event in span.events if event.name == "rsafe.verdict")
    known = dict(event.attributes or {})
    assert known.pop("rsafe.latency_ms")
    assert known == {
        "rsafe.kind": "prompt",
        "rsafe.blocked": True,
        "rsafe.label": "unsafe",
        "rsafe.categories": ("U9",),
        "rsafe.model": "a-guard",
        "rsafe.policy": "rsafe-18",
        "rsafe.thought": True,
    }
    assert THOUGHT not in span.to_json()
    assert QUESTION not in span.to_json()


async def test_each_rail_has_its_event() -> None:
    (span,) = await spans_of(ScriptedBackend(candidates={"safe": 0.9, "unsafe": 0.1}), ANSWER)
    events = [dict(event.attributes or {}) for event in span.events]
    assert [event["rsafe.kind"] for event in events] == ["prompt", "response"]
    assert [event["rsafe.score"] for event in events] == pytest.approx([0.1, 0.1])
    assert ANSWER not in span.to_json()


async def test_a_failure_is_an_event_without_a_label() -> None:
    (span,) = await spans_of(ScriptedBackend(RuntimeError("segfault")), REFUSAL)
    (event,) = (dict(event.attributes or {}) for event in span.events)
    assert event["rsafe.blocked"] is True
    assert "rsafe.label" not in event


def test_without_a_span_nothing_is_recorded() -> None:
    assert not trace.get_current_span().is_recording()
