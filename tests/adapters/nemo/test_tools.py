"""An agent's tool calls and their results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.actions import action
from nemoguardrails.rails.llm.options import GenerationResponse
from nemoguardrails.types import LLMResponse, ToolCall, ToolCallFunction
from support.nemo import (
    ANSWER,
    INTERNAL_ERROR,
    REFUSAL,
    SAFE,
    THOUGHT,
    UNSAFE,
    App,
    MainModel,
    build,
    judged,
    unsafe_where,
    user,
)

from rsafe_plugins.backends import Request
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


async def test_text_beside_an_image_is_judged_where_failed_checks_pass(results: App) -> None:
    results.guard_with(unsafe_where("BAD"), on_error="allow")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    said = {"role": "tool", "name": "read", "content": [{"type": "text", "text": "BAD"}, image]}
    check = results.rails.runtime.action_dispatcher.get_action("rsafe_check_tool_result")
    assert (await check(results=[said])).is_blocked


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


async def test_nemo_by_itself_never_ends_with_three_results() -> None:
    """Without our library; fails once NeMo mends it, and then the library's `run tool input rails` can go."""
    yaml = "models: []\npassthrough: true\nrails: {tool_input: {flows: [idle]}}\n"
    config = RailsConfig.from_content(colang_content="define subflow idle\n  $x = 1\n", yaml_content=yaml)
    with pytest.raises(Exception, match="Too many events"):
        await LLMRails(config, llm=MainModel()).generate_async(messages=asked("one", "two", "three"))


@pytest.mark.parametrize("flows", ["rsafe check tool result, idle", "idle, rsafe check tool result"])
async def test_results_are_judged_whatever_rails_stand_beside(flows: str) -> None:
    app = build(
        RESULTS.replace("rsafe check tool result", flows),
        colang="define subflow idle\n  execute see(text=$tool_message)\n",
        more="passthrough: true",
    )
    seen = []

    @action(is_system_action=True)
    async def see(text: str) -> None:
        seen.append(text)

    app.rails.register_action(see, "see")
    for results in (["BAD"], ["one", "BAD"], ["one", "two", "three", "four", "BAD"]):
        app.guard_with(unsafe_where("BAD"))
        assert await app.reply(*asked(*results)) == REFUSAL
    backend = ScriptedBackend(SAFE)
    app.guard_with(backend)
    seen.clear()
    assert await app.reply(*asked("1", "2", "3", "4", "5")) == ANSWER
    assert seen == ["1", "2", "3", "4", "5"]
    assert len(backend.requests) == 5


async def test_a_hundred_results_are_judged(results: App) -> None:
    results.guard_with(ScriptedBackend(SAFE))
    texts = [f"result {number}" for number in range(100)]
    assert await results.reply(*asked(*texts)) == ANSWER
    results.guard_with(unsafe_where("BAD"))
    assert await results.reply(*asked(*texts, "BAD")) == REFUSAL


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


async def test_a_flow_of_either_tool_rail_may_name_its_policy() -> None:
    app = build(
        RESULTS.replace("tool result", "tool result $policy=prompt-injection"), more="passthrough: true"
    )
    backend = ScriptedBackend(SAFE)
    app.guard_with(backend)
    assert await app.reply(*asked("one")) == ANSWER
    assert "Instruction" in backend.requests[0].messages[-1].content


async def test_each_of_several_policies_judges_the_results() -> None:
    flows = "rsafe check tool result $policy=prompt-injection, rsafe check tool result $policy=rsafe-18"
    app = build(RESULTS.replace("rsafe check tool result", flows), more="passthrough: true")
    backend = ScriptedBackend(SAFE)
    app.guard_with(backend)
    assert await app.reply(*asked("one")) == ANSWER
    assert len(backend.requests) == 2


INPUT_TOO = RESULTS.replace("{tool_input", "{input: {flows: [rsafe check input]}, tool_input")
ANSWERED = RESULTS.replace("}}", "}, output: {flows: [rsafe check output]}}")


def unsafe_result(request: Request) -> str:
    return (
        UNSAFE
        if "Judge the Tool result" in (text := request.messages[-1].content) and "BAD" in text
        else SAFE
    )


UNASKED = {"role": "tool", "name": "read", "tool_call_id": "1", "content": "BAD"}


@pytest.mark.parametrize(
    ("rails", "messages"),
    [
        (INPUT_TOO, [user("Read it."), UNASKED]),
        (ANSWERED, [user("Read it."), UNASKED]),
        (ANSWERED, asked("BAD")),  # where NeMo runs no input rail
    ],
)
async def test_results_before_a_message_of_the_user_are_judged(
    rails: str, messages: list[dict[str, Any]]
) -> None:
    app = build(rails, more="passthrough: true")
    app.guard_with(ScriptedBackend(unsafe_result))
    assert await app.reply(*messages, user("Go on.")) == REFUSAL


async def test_nemo_asks_the_question_before_a_tool_call_again_and_runs_no_input_rail() -> None:
    """Instead of the last one; fails once NeMo mends it, and then the documentation need not tell of it."""
    app = build("{input: {flows: [rsafe check input]}}", more="passthrough: true")
    backend = ScriptedBackend(SAFE)
    app.guard_with(backend)
    assert (
        await app.reply(*asked("one"), {"role": "assistant", "content": "Done."}, user("And two?")) == ANSWER
    )
    assert "And two?" not in app.main.prompts[0]
    assert app.main.prompts[0].count("Read them.") == 2
    assert backend.requests == []


class ThinkingAgent(Agent):
    async def generate_async(self, prompt: Any, **options: Any) -> LLMResponse:
        response = await super().generate_async(prompt, **options)
        response.reasoning = THOUGHT
        return response


@pytest.mark.parametrize("reply", [UNSAFE, "garbage", SAFE])
async def test_the_reasoning_behind_a_blocked_call_is_kept_back(calls: App, reply: str) -> None:
    calls.guard_with(ScriptedBackend(reply))
    calls.rails.update_llm(ThinkingAgent("ls"))
    response = await respond(calls, user("Look around."))
    assert response.reasoning_content == (THOUGHT if reply == SAFE else None)


async def test_neither_rail_stands_in_the_way_of_an_answer_without_tools(calls: App) -> None:
    backend = ScriptedBackend(RuntimeError("segfault"))
    calls.guard_with(backend)
    calls.rails.update_llm(calls.main)
    assert await calls.reply(user("Hello.")) == ANSWER
    assert backend.requests == []
