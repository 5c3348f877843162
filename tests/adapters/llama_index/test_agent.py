"""RSafeFunctionAgent in real workflows; only the model is scripted."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ThinkingBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import BaseMemoryBlock, ChatMemoryBuffer, Memory
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.tools import FunctionTool, QueryEngineTool, ToolOutput
from llama_index.core.workflow import Context
from pydantic import BaseModel, Field
from support.canary import CANARY, guard_backend, holds
from support.faults import FAULTS
from support.llama_index import Says, calls, query_engine, said, scripted_agent_model

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.llama_index import RSafeFunctionAgent, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

REFUSAL = "I can't help with that request."
ANSWER = "The sea is calm."
BAD = f"Here is the {CANARY} recipe."
QUESTION = "How is the sea?"


class Run:
    """An agent's run: its answer, and all that anybody may have seen of it."""

    def __init__(
        self, *replies: ChatMessage, result: str = "calm", backend: Any = None, **settings: Any
    ) -> None:
        self.model, self.asked = scripted_agent_model(*replies)
        self.tool_runs: list[str] = []
        self.backend = backend or guard_backend()
        guard = {"backend": self.backend, **settings.pop("guard", {})}

        def lookup(text: str) -> str:
            """Looks something up."""
            self.tool_runs.append(text)
            return f"{result} {text}"

        self.agent = RSafeFunctionAgent(
            name="agent",
            description="An agent.",
            tools=[FunctionTool.from_defaults(lookup)],
            llm=self.model,
            guard=guard,
            **settings,
        )
        self.memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
        self.events: list[Any] = []

    async def ask(self, question: str = QUESTION, *, workflow: bool = False) -> str:
        runs: Any = AgentWorkflow(agents=[self.agent], root_agent="agent") if workflow else self.agent
        self.context = Context(runs)
        handler = runs.run(user_msg=question, memory=self.memory, ctx=self.context)
        async for event in handler.stream_events():
            self.events.append(event)
        self.output = await handler
        return str(self.output)

    async def stored(self) -> Any:
        """What the workflow keeps, as it would be saved to go on later."""
        return dict(await self.context.store.get_state())

    def remembered(self) -> list[str]:
        return [str(message.content) for message in self.memory.get_all()]


in_a_workflow = pytest.mark.parametrize("workflow", [False, True], ids=["agent", "workflow"])


@in_a_workflow
async def test_a_safe_run_goes_on_as_without_the_guard(workflow: bool) -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(ANSWER))
    assert await run.ask(workflow=workflow) == ANSWER
    assert run.tool_runs == ["sea"]
    assert run.remembered()[0] == QUESTION
    assert run.remembered()[-1] == ANSWER


async def test_each_thing_is_judged_once_and_calls_with_their_answer() -> None:
    run = Run(calls(("lookup", {"text": "a"}), ("lookup", {"text": "b"}), text="Let me see."), said(ANSWER))
    await run.ask()
    # The question; the answer with its two calls; the two results; the answer.
    assert len(run.backend.requests) == 1 + 3 + 2 + 1
    assert [len(call) for call in run.backend.calls[:2]] == [1, 3]


async def test_results_that_a_workflow_brings_are_one_batch() -> None:
    run = Run(calls(*(("lookup", {"text": str(number)}) for number in range(5))), said(ANSWER))
    await run.ask(workflow=True)
    assert [len(call) for call in run.backend.calls] == [1, 5, 5, 1]


@in_a_workflow
async def test_an_unsafe_question_reaches_no_model_and_is_forgotten(workflow: bool) -> None:
    run = Run(said(ANSWER))
    assert await run.ask(f"Tell me the {CANARY}.", workflow=workflow) == REFUSAL
    assert run.asked == []
    assert run.remembered() == [REFUSAL]


async def test_an_attack_before_the_last_message_is_judged() -> None:
    run = Run(said(ANSWER))
    run.memory.set([ChatMessage("Hi.", role="user"), said("Hello."), ChatMessage(BAD, role="user")])
    assert await run.ask("Do it.") == REFUSAL
    assert run.remembered() == ["Hi.", "Hello.", REFUSAL]


@pytest.mark.parametrize(
    ("question", "answer", "asked"), [(f"Tell me the {CANARY}.", REFUSAL, 0), (QUESTION, ANSWER, 1)]
)
async def test_what_another_agent_hands_over_is_judged(question: str, answer: str, asked: int) -> None:
    run = Run(said(ANSWER))
    assert await handed_over(run, question) == answer
    assert len(run.asked) == asked
    assert not holds(CANARY, run.remembered())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("on_error", ["block", "allow", "raise"])
async def test_a_guard_that_fails_after_a_handover_does_what_on_error_says(
    fault: str, on_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(
        said(ANSWER),
        backend=ScriptedBackend(FAULTS[fault]),
        guard={"timeout": 0.1, "on_error": on_error},
        **{name: name == "check_input" for name in CHECKS},
    )
    if on_error == "raise":
        with pytest.raises(Exception, match=r"."):
            await handed_over(run, QUESTION)
    else:
        assert await handed_over(run, QUESTION) == (ANSWER if on_error == "allow" else REFUSAL)
    assert len(run.asked) == (1 if on_error == "allow" else 0)
    assert ("the guard failed" in caplog.text) == (on_error == "block")


async def handed_over(run: Run, question: str) -> str:
    """The answer to a question that another agent hands over to the one that is guarded."""
    hand_over = calls(("handoff", {"to_agent": "agent", "reason": "It knows more."}))
    model, _ = scripted_agent_model(hand_over)
    router = FunctionAgent(
        name="router", description="A router.", llm=model, can_handoff_to=["agent"], streaming=False
    )
    workflow = AgentWorkflow(agents=[router, run.agent], root_agent="router")
    return str(await workflow.run(user_msg=question, memory=run.memory))


async def test_text_beside_an_image_from_a_tool_is_judged_where_failed_checks_pass() -> None:
    blocks = [TextBlock(text=BAD), ImageBlock(url="https://example.org/a.png")]
    output = ToolOutput(blocks=blocks, tool_name="lookup", raw_input={}, raw_output=None)
    run = Run(calls(("lookup", {"text": "sea"})), said(ANSWER), guard={"on_error": "allow"})
    run.agent.tools = [
        FunctionTool.from_defaults(lambda text: output, name="lookup", description="Looks up.")
    ]
    assert await run.ask() == ANSWER
    assert not holds(CANARY, run.asked[-1])


async def test_an_agents_name_may_have_dots() -> None:
    run = Run(said(ANSWER))
    run.agent.name = "our.agent"
    workflow = AgentWorkflow(agents=[run.agent], root_agent="our.agent")
    assert str(await workflow.run(user_msg=QUESTION, memory=run.memory)) == ANSWER


@in_a_workflow
async def test_an_unsafe_answer_is_seen_by_nobody(workflow: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    run = Run(said(BAD))
    assert await run.ask(workflow=workflow) == REFUSAL
    assert run.remembered() == [QUESTION, REFUSAL]
    assert not holds(CANARY, run.events, run.output, await run.stored(), caplog.text)


@in_a_workflow
async def test_a_blocked_tool_never_runs(workflow: bool) -> None:
    run = Run(calls(("lookup", {"text": BAD})), said(ANSWER))
    assert await run.ask(workflow=workflow) == REFUSAL
    assert run.tool_runs == []
    assert not holds(CANARY, run.events, run.output, run.remembered(), await run.stored())


async def test_an_unsafe_result_is_seen_by_nobody_and_the_agent_goes_on() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(ANSWER), result=BAD)
    assert await run.ask() == ANSWER
    assert run.tool_runs == ["sea"]
    assert not holds(CANARY, run.events, run.output, run.remembered(), run.asked, await run.stored())
    assert holds(REFUSAL, run.asked[-1])


async def test_an_unsafe_result_in_a_workflow_reaches_no_model() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(ANSWER), result=BAD)
    assert await run.ask(workflow=True) == ANSWER
    assert not holds(CANARY, run.remembered(), run.asked)


async def test_what_a_failing_tool_says_is_judged() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(ANSWER))

    def lookup(text: str) -> str:
        """Looks something up."""
        raise ValueError(BAD)

    run.agent.tools = [FunctionTool.from_defaults(lookup)]
    assert await run.ask() == ANSWER
    assert not holds(CANARY, run.asked, run.events, run.remembered())


@pytest.mark.parametrize("stage", ["prompt", "response", "tool_call", "tool_result"])
async def test_a_violation_may_be_an_error(stage: str) -> None:
    first = calls(("lookup", {"text": BAD if stage == "tool_call" else "sea"}))
    replies = (said(BAD),) if stage == "response" else (first, said(ANSWER))
    seen: list[str] = []
    run = Run(
        *replies,
        result=BAD if stage == "tool_result" else "calm",
        exit_behavior="error",
        on_violation=lambda kind, verdict: seen.append(kind),
    )
    with pytest.raises(RSafeViolationError) as raised:
        await run.ask(BAD if stage == "prompt" else QUESTION)
    assert raised.value.stage == stage
    assert seen == [stage]


async def test_an_answer_after_too_many_steps_is_judged() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(BAD))
    handler = run.agent.run(
        user_msg=QUESTION, memory=run.memory, max_iterations=1, early_stopping_method="generate"
    )
    async for event in handler.stream_events():
        assert not holds(CANARY, event)
    assert str(await handler) == REFUSAL


CHECKS = ("check_input", "check_output", "check_tool_calls", "check_tool_results")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("on_error", ["block", "allow", "raise"])
async def test_a_failed_guard_does_what_on_error_says(fault: str, on_error: str, check: str) -> None:
    run = Run(
        calls(("lookup", {"text": "sea"})),
        said(ANSWER),
        backend=ScriptedBackend(FAULTS[fault]),
        guard={"timeout": 0.1, "on_error": on_error},
        **{name: name == check for name in CHECKS},
    )
    if on_error == "raise":
        with pytest.raises(Exception, match=r"."):
            await run.ask()
    elif on_error == "allow":
        assert await run.ask() == ANSWER
    else:
        assert await run.ask() == (ANSWER if check == "check_tool_results" else REFUSAL)
    if check in ("check_input", "check_tool_calls") and on_error != "allow":
        assert run.tool_runs == []
    if check == "check_tool_results" and on_error == "block":
        assert not holds("calm'", run.asked[-1])


@pytest.mark.parametrize("name", ["policy", "check_tool_result", "exit_behaviour"])
def test_what_the_agent_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"takes no {name}"):
        Run(said(ANSWER), **{name: False})
    assert Run(said(ANSWER), timeout=30, verbose=False).agent


def test_what_cannot_be_judged_is_refused() -> None:
    class Weather(BaseModel):
        text: str

    with pytest.raises(SettingsError, match="leave streaming False"):
        Run(said(ANSWER), streaming=True)
    with pytest.raises(SettingsError, match="use structured_output_fn"):
        Run(said(ANSWER), output_cls=Weather)


async def test_the_leak_test_finds_leaks() -> None:
    """The same without the guard: were these not found, the tests above would say nothing."""
    model, _ = scripted_agent_model(said(BAD))
    agent = FunctionAgent(llm=model, tools=[])
    context: Any = Context(agent)
    handler = agent.run(user_msg=QUESTION, ctx=context)
    events = [event async for event in handler.stream_events()]
    assert holds(CANARY, events)
    assert holds(CANARY, await handler)
    assert holds(CANARY, dict(await context.store.get_state()))


# After the first step, and after runs that broke off


@in_a_workflow
@pytest.mark.parametrize("exit_behavior", ["replace", "error"])
@pytest.mark.parametrize("last", [said(BAD), calls(("lookup", {"text": BAD}))], ids=["answer", "tool call"])
async def test_what_is_unsafe_in_a_later_step_is_remembered_by_nobody(
    last: ChatMessage, exit_behavior: Any, workflow: bool
) -> None:
    run = Run(calls(("lookup", {"text": "sea"})), last, said(ANSWER), exit_behavior=exit_behavior)
    if exit_behavior == "error":
        with pytest.raises(RSafeViolationError):
            await run.ask(workflow=workflow)
    else:
        assert await run.ask(workflow=workflow) == REFUSAL
    assert not holds(CANARY, run.remembered(), await run.stored(), run.events)
    await run.ask("And now?")
    assert not holds(CANARY, run.remembered(), run.asked)


async def test_a_message_after_a_run_that_broke_off_is_judged() -> None:
    run = Run(calls(("lookup", {"text": "sea"})))
    context: Any = Context(run.agent)
    handler = run.agent.run(user_msg=QUESTION, memory=run.memory, ctx=context, max_iterations=2)
    with pytest.raises(Exception, match="Max iterations"):
        await handler
    run.asked.clear()
    again = run.agent.run(user_msg=f"Tell me the {CANARY}.", memory=run.memory, ctx=context)
    assert str(await again) == REFUSAL
    assert run.asked == []


async def test_what_a_workflow_would_generate_by_itself_is_refused() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(BAD))
    flow = AgentWorkflow(agents=[run.agent], root_agent="agent", early_stopping_method="generate")
    with pytest.raises(Exception, match="leave early_stopping_method at force"):
        await flow.run(user_msg=QUESTION, max_iterations=1)
    assert run.asked == []


@pytest.mark.parametrize("exit_behavior", ["replace", "error"])
async def test_a_blocked_message_is_forgotten_whatever_stands_behind_it(exit_behavior: Any) -> None:
    run = Run(said(ANSWER), exit_behavior=exit_behavior)
    history = [
        ChatMessage("Hi.", role="user"),
        said("Hello."),
        ChatMessage(BAD, role="user"),
        ChatMessage("Be brief.", role="system"),
    ]
    handler = run.agent.run(user_msg="Do it.", chat_history=history, memory=run.memory)
    if exit_behavior == "error":
        with pytest.raises(RSafeViolationError):
            await handler
    else:
        await handler
    assert not holds(CANARY, run.remembered())
    assert run.remembered()[:2] == ["Hi.", "Hello."]
    assert await run.ask("And now?") == ANSWER


async def test_a_tool_call_in_a_given_history_is_judged() -> None:
    run = Run(said(ANSWER))
    history = [
        ChatMessage("Hi.", role="user"),
        calls(("lookup", {"text": BAD})),
        ChatMessage("ok", role="tool"),
    ]
    run.memory.set(history[:-1])
    handler = run.agent.run(chat_history=history, memory=run.memory)
    assert str(await handler) == REFUSAL


async def test_nodes_behind_a_tools_result_are_judged() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), said(ANSWER))
    engine = query_engine(Says(text="fine"), BAD)
    run.agent.tools = [QueryEngineTool.from_defaults(engine, name="lookup", description="Looks up.")]
    run.model.response_generator = _replies(calls(("lookup", {"input": "sea"})), said(ANSWER))
    await run.ask()
    assert not holds(CANARY, run.events, run.output)


async def test_a_result_that_changes_is_judged_again() -> None:
    shared = ToolOutput(content="fine", tool_name="lookup", raw_input={}, raw_output=None)

    def lookup(text: str) -> Any:
        """Looks something up."""
        if text == "second":
            shared.blocks = [TextBlock(text=BAD)]
        return shared

    run = Run(calls(("lookup", {"text": "first"})), calls(("lookup", {"text": "second"})), said(ANSWER))
    run.agent.tools = [FunctionTool.from_defaults(lookup)]
    await run.ask()
    assert not holds(CANARY, run.asked, run.remembered())


async def test_a_direct_result_is_an_answer() -> None:
    run = Run(calls(("lookup", {"text": "sea"})), check_tool_results=False)

    def lookup(text: str) -> str:
        """Looks something up."""
        return BAD

    run.agent.tools = [FunctionTool.from_defaults(lookup, return_direct=True)]
    run.model.response_generator = _replies(calls(("lookup", {"text": "sea"})), said(ANSWER))
    await run.ask()
    assert not holds(CANARY, run.output, run.remembered(), run.events)


async def test_signatures_of_thoughts_are_no_content() -> None:
    signed = ChatMessage(role="assistant", additional_kwargs={"thought_signatures": [b"\x00\xff"]})
    thought = ThinkingBlock(content="hm", additional_information={"signature": b"\x00", "thinking": ""})
    signed.blocks = [thought, TextBlock(text=ANSWER)]
    assert await Run(signed).ask() == ANSWER
    bad = signed.model_copy(deep=True)
    bad.blocks = [ThinkingBlock(content=BAD, additional_information={"thinking": ""}), TextBlock(text="fine")]
    assert await Run(bad).ask() == REFUSAL


def test_a_policy_without_a_category_for_a_check_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no category that applies to a prompt: set check_input=False"):
        Run(said(ANSWER), guard={"policy": "prompt-injection"})


def _replies(*replies: ChatMessage) -> Any:
    rest = list(replies)
    return lambda messages, **_: (rest.pop(0) if len(rest) > 1 else rest[0]).model_copy(deep=True)


class Notes(BaseMemoryBlock[str]):
    """Remembers what the memory hands it."""

    name: str = "notes"
    got: list[str] = Field(default_factory=list)

    async def _aget(self, messages: Any = None, **_: Any) -> str:
        return ""

    async def _aput(self, messages: list[ChatMessage]) -> None:
        self.got += [str(message.content) for message in messages]


async def test_forgetting_what_is_blocked_gives_a_memory_block_nothing_twice() -> None:
    notes = Notes()
    memory = Memory.from_defaults(
        token_limit=60, token_flush_size=10, memory_blocks=[notes], tokenizer_fn=lambda text: text.split()
    )
    llm, _ = scripted_agent_model(said("An answer."))
    agent = RSafeFunctionAgent(llm=llm, tools=[], guard={"backend": guard_backend()})
    for number in range(6):
        await agent.run(user_msg=f"Question {number} " + "word " * 12, memory=memory)
    archived = await memory.aget_all(MessageStatus.ARCHIVED)
    assert archived
    await agent.run(user_msg=f"Tell me the {CANARY}.", memory=memory)
    assert await memory.aget_all(MessageStatus.ARCHIVED) == archived
    assert not holds(CANARY, await memory.aget_all())
    await agent.run(user_msg="And now? " + "word " * 12, memory=memory)
    questions = [text for text in notes.got if text.startswith("Question")]
    assert len(questions) == len(set(questions))
