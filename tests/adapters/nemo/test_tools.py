"""An agent's tool calls and their results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from nemoguardrails.rails.llm.options import GenerationResponse
from nemoguardrails.types import LLMResponse, ToolCall, ToolCallFunction
from support.nemo import (
    ANSWER,
    INTERNAL_ERROR,
    REFUSAL,
    SAFE,
    UNSAFE,
    App,
    MainModel,
    build,
    judged,
    unsafe_where,
    user,
)

from rsafe_plugins.errors import BackendError
from rsafe_plugins.testing import ScriptedBackend

CALLS = "{tool_output: {flows: [rsafe check tool call]}}"
RESULTS = "{tool_input: {flows: [rsafe check tool result]}}"


class Agent(MainModel):
    """A main model that asks for tools."""

    def __init__(self, *arguments: str) -> None:
        super().__init__()
        self.arguments = arguments

    async def generate_async(self, prompt: Any, **options: Any) -> LLMResponse:
        response = await super().generate_async(prompt, **options)
        response.content = ""
        response.tool_calls = [
            ToolCall(id=str(number), function=ToolCallFunction("run", {"command": command}))
            for number, command in enumerate(self.arguments)
        ]
        return response


def with_tools(app: App, *arguments: str) -> None:
    app.rails.update_llm(Agent(*arguments))


@pytest.fixture(scope="module")
def calls() -> App:
    return build(CALLS, more="passthrough: true")


@pytest.fixture(scope="module")
def results() -> App:
    return build(RESULTS, more="passthrough: true")


async def respond(app: App, *messages: dict[str, Any]) -> GenerationResponse:
    response = await app.respond(*messages)
    assert isinstance(response, GenerationResponse)
    return response


def said(response: GenerationResponse) -> str:
    assert isinstance(response.response, list)
    return str(response.response[-1]["content"])


async def test_harmless_calls_reach_the_client_and_are_one_batch(calls: App) -> None:
    backend = ScriptedBackend(SAFE)
    calls.guard_with(backend)
    with_tools(calls, "ls", "pwd")
    response = await respond(calls, user("Look around."))
    assert response.tool_calls is not None
    assert [call["function"]["arguments"] for call in response.tool_calls] == [
        {"command": "ls"},
        {"command": "pwd"},
    ]
    assert [len(call) for call in backend.calls] == [2]
    first, second = judged(backend)
    assert 'Tool call (run): {"command": "ls"}' in first
    assert 'Tool call (run): {"command": "pwd"}' in second
    assert "User: Look around." in first


async def test_one_blocked_call_keeps_back_all_calls_of_its_turn(calls: App) -> None:
    calls.guard_with(unsafe_where("BAD"))
    with_tools(calls, "ls", "BAD")
    response = await respond(calls, user("Look around."))
    assert not response.tool_calls
    assert said(response) == REFUSAL
    assert "BAD" not in json.dumps(response.response)
    assert "BAD" not in repr(response.llm_output)


async def test_a_blocked_call_is_an_exception_where_the_config_asks_for_one() -> None:
    app = build(CALLS, more="passthrough: true\nenable_rails_exceptions: true")
    app.guard_with(ScriptedBackend(UNSAFE))
    with_tools(app, "BAD")
    response = await respond(app, user("Look around."))
    assert not response.tool_calls
    assert "ToolCallRailException" in json.dumps(response.response)


@pytest.mark.parametrize(
    "fault", ["garbage", BackendError("no memory left"), RuntimeError("segfault")], ids=str
)
@pytest.mark.parametrize(("on_error", "passes"), [("block", False), ("allow", True), ("raise", False)])
async def test_calls_without_a_verdict_follow_on_error(
    calls: App, fault: Any, on_error: str, passes: bool
) -> None:
    calls.guard_with(ScriptedBackend(fault), on_error=on_error)
    with_tools(calls, "ls")
    response = await respond(calls, user("Look around."))
    assert bool(response.tool_calls) == passes
    assert said(response) == ("" if passes else REFUSAL)


async def test_an_action_of_ours_that_breaks_keeps_back_the_calls(
    calls: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls.guard_with(ScriptedBackend(SAFE))
    with_tools(calls, "ls")
    monkeypatch.setattr("rsafe_plugins.nemo.actions._named_call", lambda call: 1 / 0)
    response = await respond(calls, user("Look around."))
    assert not response.tool_calls


@pytest.mark.parametrize(
    "call",
    [
        {"name": "run", "args": {"command": "BAD"}},
        {"id": "1", "function": {"name": "run", "arguments": '{"command": "BAD"}'}},
        ToolCall(id="1", function=ToolCallFunction("run", {"command": "BAD"})),
        {"unheard of": "BAD"},
        "BAD",
    ],
    ids=["langchain", "openai", "nemo", "other", "text"],
)
async def test_a_call_of_any_form_is_judged(calls: App, call: object) -> None:
    backend = unsafe_where("BAD")
    calls.guard_with(backend)
    check = calls.rails.runtime.action_dispatcher.get_action("rsafe_check_tool_call")
    assert (await check(tool_calls=[call])).is_blocked
    assert "BAD" in judged(backend)[0]


def asked(*contents: object) -> list[dict[str, Any]]:
    """A conversation that ends with tools' results."""
    tools = [
        {"id": str(number), "type": "function", "function": {"name": "read", "arguments": "{}"}}
        for number in range(len(contents))
    ]
    answers = [
        {"role": "tool", "name": "read", "tool_call_id": str(number), "content": content}
        for number, content in enumerate(contents)
    ]
    return [user("Read them."), {"role": "assistant", "content": "", "tool_calls": tools}, *answers]


async def test_results_of_a_turn_are_one_batch_and_the_worst_decides(results: App) -> None:
    backend = unsafe_where("BAD")
    results.guard_with(backend)
    assert await results.reply(*asked("one", "BAD", "three")) == REFUSAL
    assert results.main.prompts == []
    assert [len(call) for call in backend.calls] == [3]
    assert "Tool result (read): BAD" in judged(backend)[1]


async def test_results_that_pass_reach_the_main_model_and_its_answer_the_client(results: App) -> None:
    results.guard_with(ScriptedBackend(SAFE))
    assert await results.reply(*asked("one", "two")) == ANSWER
    (prompt,) = results.main.prompts
    assert "one" in prompt
    assert "two" in prompt


async def test_the_answer_to_results_is_judged_as_any() -> None:
    app = build(RESULTS.replace("}}", "}, output: {flows: [rsafe check output]}}"), more="passthrough: true")
    app.guard_with(unsafe_where(ANSWER))
    assert await app.reply(*asked("one")) == REFUSAL
    assert len(app.main.prompts) == 1


async def test_nemo_by_itself_asks_no_main_model_after_results_that_pass() -> None:
    """With a rail that does nothing; fails once NeMo mends it, and then our library needs no flow for it."""
    idle = "define subflow idle\n  $x = 1\n"
    app = build("{tool_input: {flows: [idle]}}", colang=idle, more="passthrough: true")
    assert await app.reply(*asked("one")) == ""
    assert app.main.prompts == []


@pytest.mark.parametrize(
    "fault", ["garbage", BackendError("no memory left"), RuntimeError("segfault")], ids=str
)
async def test_results_without_a_verdict_follow_on_error(results: App, fault: Any) -> None:
    for on_error, reply in (("block", REFUSAL), ("allow", ANSWER), ("raise", INTERNAL_ERROR)):
        results.guard_with(ScriptedBackend(fault), on_error=on_error)
        assert await results.reply(*asked("one")) == reply


async def test_a_result_with_an_image_is_a_failed_check(results: App) -> None:
    results.guard_with(ScriptedBackend(SAFE))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert await results.reply(*asked([{"type": "text", "text": "one"}, image])) == REFUSAL


async def test_neither_rail_stands_in_the_way_of_an_answer_without_tools(calls: App) -> None:
    backend = ScriptedBackend(RuntimeError("segfault"))
    calls.guard_with(backend)
    calls.rails.update_llm(calls.main)
    assert await calls.reply(user("Hello.")) == ANSWER
    assert backend.requests == []
