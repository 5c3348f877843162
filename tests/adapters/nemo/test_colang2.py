"""The rails under Colang 2."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.types import LLMResponseChunk
from support.nemo import ANSWER, REFUSAL, SAFE, THOUGHT, UNSAFE, MainModel, judged, unsafe_where, user

from rsafe_plugins.backends import Backend, Request
from rsafe_plugins.errors import BackendError, SettingsError
from rsafe_plugins.testing import ScriptedBackend

IMPORTS = "import core\nimport guardrails\nimport rsafe_plugins.rails\n"
CHAT = """
flow input rails $input_text
  rsafe check input

flow output rails $output_text
  rsafe check output

flow main
  user said something
  bot say "The sea is calm today."
"""


def build(
    backend: Backend, flows: str = CHAT, *, more: str = "", main: MainModel | None = None, **settings: object
) -> LLMRails:
    config = RailsConfig.from_content(
        colang_content=IMPORTS + flows,
        yaml_content=f'colang_version: "2.x"\nmodels: []\nimport_paths: [rsafe_plugins/rails]\n{more}',
    )
    config.custom_data["rsafe"] = {"backend": backend, **settings}
    return LLMRails(config, llm=main or MainModel())


async def reply(app: LLMRails, text: str = "How is the sea?") -> str:
    return str((await app.generate_async(messages=[user(text)]))["content"])


async def test_a_harmless_exchange_passes_and_each_message_is_judged_once() -> None:
    backend = ScriptedBackend(SAFE)
    assert await reply(build(backend)) == ANSWER
    prompt, answer = judged(backend)
    assert prompt.startswith("User: How is the sea?\n<END")
    assert answer.startswith(f"User: How is the sea?\nAgent: {ANSWER}\n<END")


@pytest.mark.parametrize("part", ["How is the sea?\n<END", ANSWER], ids=["input", "output"])
async def test_what_is_blocked_is_refused(part: str) -> None:
    assert await reply(build(unsafe_where(part))) == REFUSAL


async def test_the_users_own_refusal_is_said() -> None:
    own = '\n@override\nflow bot refuse to respond\n  bot say "Let us talk about the sea."\n'
    backend = ScriptedBackend(lambda request: UNSAFE if "about the sea" not in str(request) else SAFE)
    assert await reply(build(backend, CHAT + own)) == "Let us talk about the sea."


async def hang(request: Request) -> str:
    await asyncio.Event().wait()
    return SAFE


FAULTS: dict[str, Backend] = {
    "hung": ScriptedBackend(hang),
    "reports an error": ScriptedBackend(BackendError("no memory left")),
    "crashes": ScriptedBackend(RuntimeError("segfault")),
    "drops the request": ScriptedBackend(asyncio.CancelledError()),
    "writes garbage": ScriptedBackend("Sure, that is safe."),
    "scores NaN": ScriptedBackend(candidates={"safe": math.nan, "unsafe": math.nan}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("on_error", ["block", "allow", "raise"])
async def test_a_failed_guard_does_what_on_error_says(fault: str, on_error: str) -> None:
    timeout = 0.2 if fault == "hung" else 60
    app = build(FAULTS[fault], on_error=on_error, timeout=timeout)
    answer = await reply(app)
    if on_error == "raise":
        # NeMo ends the flow of an action that raises, and nobody answers.
        assert ANSWER not in answer
    else:
        assert answer == {"block": REFUSAL, "allow": ANSWER}[on_error]


async def test_nothing_of_the_guards_thought_is_returned() -> None:
    backend = ScriptedBackend(f"<think>{THOUGHT}</think>\n\\boxed{{unsafe}}\nCategories: U9, {THOUGHT}")
    app = build(backend)
    message = await app.generate_async(messages=[user("How is the sea?")])
    assert THOUGHT not in repr(message)
    output, state = await app.process_events_async(
        [{"type": "UtteranceUserActionFinished", "final_transcript": "How is the sea?"}]
    )
    assert THOUGHT not in repr(output)
    assert THOUGHT not in repr(state)


async def test_each_instance_judges_under_its_own_policy() -> None:
    flows = CHAT.replace("rsafe check input", 'rsafe check input $policy="mlcommons"')
    backend = ScriptedBackend(SAFE)
    assert await reply(build(backend, flows)) == ANSWER
    first, second = (request.messages[-1].content for request in backend.requests)
    assert "S1: Violent Crimes" in first
    assert "S1: Violent Crimes" not in second


async def test_a_policy_that_is_not_there_blocks() -> None:
    flows = CHAT.replace("rsafe check input", '$mine = "nonsense"\n  rsafe check input $policy=$mine')
    assert ANSWER not in await reply(build(ScriptedBackend(SAFE), flows))


async def talk(app: LLMRails, *turns: str) -> list[list[str]]:
    """What is said in each turn of a conversation that NeMo keeps the state of."""
    state, said = None, []
    for text in turns:
        events = [{"type": "UtteranceUserActionFinished", "final_transcript": text}]
        said.append([])
        while events:
            output, state = await app.process_events_async(events, state)
            spoken = [event for event in output if event["type"] == "StartUtteranceBotAction"]
            said[-1] += [event["script"] for event in spoken]
            events = [
                {
                    **event,
                    "type": "UtteranceBotActionFinished",
                    "final_script": event["script"],
                    "is_success": True,
                }
                for event in spoken
            ]
    return said


IN_TURNS = CHAT.replace("flow main\n", "flow main\n  activate chat\n\nflow chat\n").replace(
    "The sea is calm today.", "It is BAD."
)


@pytest.mark.parametrize(
    ("reply", "more"),
    [(UNSAFE, ""), (UNSAFE, "enable_rails_exceptions: true"), ("garbage", "")],
    ids=["unsafe", "with exceptions", "no verdict"],
)
async def test_an_answer_after_a_blocked_one_is_judged(reply: str, more: str) -> None:
    backend = ScriptedBackend(
        lambda request: reply if "Agent: It is BAD.\n<END" in request.messages[-1].content else SAFE
    )
    turns = await talk(build(backend, IN_TURNS, more=more), "one", "two", "three")
    assert turns == [[] if more else [REFUSAL]] * 3
    assert sum("Agent: It is BAD.\n<END" in text for text in judged(backend)) >= 3


async def test_an_answer_after_another_rail_that_aborted_is_judged() -> None:
    other = '  if $output_text == "Hello."\n    bot refuse to respond\n    abort\n  rsafe check output\n'
    both = IN_TURNS.replace("  rsafe check output\n", other).replace(
        '  bot say "It is BAD."',
        '  bot say "Hello."\n\nflow chat again\n  user said "two"\n  bot say "It is BAD."',
    )
    both = both.replace("user said something", 'user said "one"').replace(
        "  activate chat\n", "  activate chat\n  activate chat again\n"
    )
    turns = await talk(build(unsafe_where("Agent: It is BAD.\n<END"), both), "one", "two")
    assert turns == [[REFUSAL]] * 2


async def test_an_answer_after_a_check_that_raised_is_judged() -> None:
    backend = ScriptedBackend(
        lambda request: "garbage" if "Agent: It is BAD.\n<END" in request.messages[-1].content else SAFE
    )
    turns = await talk(build(backend, IN_TURNS, on_error="raise"), "one", "two", "three")
    assert not any("BAD" in text for said in turns for text in said)


@pytest.mark.xfail(strict=True, reason="NeMo skips the output rails of what is said while they run.")
async def test_answers_that_are_said_at_once_are_each_judged() -> None:
    both = CHAT.replace(
        'bot say "The sea is calm today."', 'bot say "The sea is calm today." and bot say "It is BAD."'
    )
    backend = unsafe_where("Agent: It is BAD.\n<END")
    (said,) = await talk(build(backend, both), "one")
    assert "It is BAD." not in said


async def test_the_rails_run_without_nemos_own_import() -> None:
    config = RailsConfig.from_content(
        colang_content="import core\nimport rsafe_plugins.rails\n" + CHAT,
        yaml_content='colang_version: "2.x"\nmodels: []\nimport_paths: [rsafe_plugins/rails]\n',
    )
    config.custom_data["rsafe"] = {"backend": ScriptedBackend(UNSAFE)}
    assert await reply(LLMRails(config, llm=MainModel())) == REFUSAL


async def test_a_conversation_of_several_turns_is_judged_as_one() -> None:
    flows = CHAT.replace("flow main\n", "flow main\n  activate chat\n\nflow chat\n")
    backend = ScriptedBackend(SAFE)
    app = build(backend, flows)
    await talk(app, "one", "two")
    prompts = [text for text in judged(backend) if text.partition("\n<END")[0].endswith("User: two")]
    assert prompts == [f"User: one\nAgent: {ANSWER}\nUser: two\n<END CONVERSATION>"]


RETRIEVAL = """
flow main
  user said something
  global $relevant_chunks
  global $relevant_chunks_sep
  $relevant_chunks = "one\\nBAD two\\nthree"
  $relevant_chunks_sep = ["one", "BAD two", "three"]
  rsafe check retrieval
  bot say "{$relevant_chunks}"
"""


async def test_flagged_chunks_are_removed() -> None:
    answer = await reply(build(unsafe_where("BAD"), RETRIEVAL))
    assert answer.split() == ["one", "three"]


TOOLS = """
flow main
  user said something
  rsafe check tool call $tool_calls=[{"name": "run", "args": {"command": "COMMAND"}}]
  rsafe check tool result $results=[{"name": "run", "content": "RESULT"}]
  bot say "Done."
"""


@pytest.mark.parametrize(
    ("command", "result", "said"),
    [("ls", "a file", "Done."), ("BAD", "a file", REFUSAL), ("ls", "BAD", REFUSAL)],
)
async def test_tool_calls_and_results_are_judged(command: str, result: str, said: str) -> None:
    flows = TOOLS.replace("COMMAND", command).replace("RESULT", result)
    assert await reply(build(unsafe_where("BAD"), flows)) == said


@pytest.mark.parametrize("on", [True, False])
async def test_nothing_that_was_blocked_is_streamed(on: bool) -> None:
    app = build(unsafe_where(ANSWER))
    app.config.rails.output.streaming.enabled = on
    app.config.rails.output.streaming.stream_first = False
    streamed = "".join([chunk async for chunk in app.stream_async(messages=[user("How is the sea?")])])
    assert ANSWER not in streamed


PASSTHROUGH = """
flow chat
  user said something as $said
  $answer = await PassthroughLLMAction(user_message=$said.transcript)
  bot say $answer

flow main
  activate chat
  match Never()
"""
RAILS = CHAT.partition("flow main")[0]


class Streaming(MainModel):
    async def stream_async(self, prompt: Any, **options: Any) -> AsyncIterator[LLMResponseChunk]:
        for word in ("This ", "is ", "BAD."):
            yield LLMResponseChunk(delta_content=word)


@pytest.mark.parametrize("reply", [UNSAFE, "garbage", SAFE])
@pytest.mark.parametrize(
    "rails",
    [RAILS, RAILS.replace("check output", "check  output"), RAILS.partition("flow output")[0]],
    ids=["both", "spaced", "input alone"],
)
async def test_what_an_action_streams_before_any_rail_is_held_where_answers_are_judged(
    reply: str, rails: str
) -> None:
    backend = ScriptedBackend(lambda request: reply if "BAD" in str(request) else SAFE)
    app = build(backend, rails + PASSTHROUGH, main=Streaming())
    streamed = "".join([chunk async for chunk in app.stream_async(messages=[user("Hi.")])])
    assert streamed == ("" if "flow output" in rails else "This is BAD.")


@pytest.mark.parametrize("include_metadata", [False, True])
async def test_a_held_stream_still_says_that_it_failed(include_metadata: bool) -> None:
    class Down(MainModel):
        async def stream_async(self, prompt: Any, **options: Any) -> AsyncIterator[LLMResponseChunk]:
            raise RuntimeError("BAD things in a message")
            yield

    app = build(ScriptedBackend(SAFE), RAILS + PASSTHROUGH, main=Down())
    stream = app.stream_async(messages=[user("Hi.")], include_metadata=include_metadata)
    streamed = [chunk async for chunk in stream]
    assert [json.loads(chunk)["error"]["type"] for chunk in streamed] == ["generation_error"]
    assert "BAD" not in str(streamed)


@pytest.mark.parametrize(
    ("section", "flow"),
    [
        ("retrieval", "rsafe check retrieval"),
        ("tool_output", "rsafe check tool call"),
        ("tool_input", "rsafe check tool result"),
    ],
)
def test_sections_that_nemo_does_not_read_in_colang_2_stop_the_app(section: str, flow: str) -> None:
    with pytest.raises(RuntimeError) as stopped:
        build(ScriptedBackend(SAFE), more=f"rails: {{{section}: {{flows: [{flow}]}}}}")
    assert isinstance(stopped.value.__cause__, SettingsError)
    assert f"no flows of rails.{section} in Colang 2: await '{flow}'" in str(stopped.value.__cause__)


@pytest.mark.parametrize("policy", ['["mlcommons"]', '""', "7", '"nonsense"', '"$x"'])
async def test_what_is_no_policy_lets_nothing_through(policy: str) -> None:
    backend = ScriptedBackend(SAFE)
    flows = CHAT.replace("rsafe check input", f"$mine = {policy}\n  rsafe check input $policy=$mine")
    assert await reply(build(backend, flows)) != ANSWER
    assert backend.requests == []
