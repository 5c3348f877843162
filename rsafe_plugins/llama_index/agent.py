"""An agent behind the guard."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.agent.workflow import AgentOutput, FunctionAgent, ToolCallResult
from llama_index.core.agent.workflow.agent_context import AgentContext
from llama_index.core.llms import LLM, ChatMessage, ChatResponse, MessageRole
from llama_index.core.memory import BaseMemory
from llama_index.core.tools import AsyncBaseTool, ToolOutput
from llama_index.core.workflow import Context
from pydantic import PrivateAttr

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard import Content, Guard, GuardSettings
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.texts import Part, parts, text_of
from rsafe_plugins.guard.violation import REFUSAL
from rsafe_plugins.llama_index.judging import (
    EngineExitBehavior,
    Judge,
    OnViolation,
    asked_of_message,
    blocks_of,
    part,
    said_of,
    turns_of,
)


class RSafeFunctionAgent(FunctionAgent):
    """A `FunctionAgent` whose input, answers, tool calls and tools' results are judged.

    It takes what `FunctionAgent` takes, and the arguments below. What the model says is judged before anybody sees
    it, its tool calls with it as one engine batch: a blocked tool never runs. A tool's result is judged before the
    model and the event stream get it. The refusal ends the run; in the place of a tool's result it doesn't.

    Answers are not streamed token by token (`streaming` is False), and what `output_cls` would generate isn't judged,
    so that it is refused; judge it in a `structured_output_fn` of your own.

    Args:
        guard: A `Guard`, or the settings to make one; None for `Guard()`.
        check_input: Judge what the user says.
        check_output: Judge what the model answers.
        check_tool_calls: Judge its tool calls.
        check_tool_results: Judge what tools bring.
        exit_behavior: `replace` (the default) puts the refusal in the place of what is blocked; `error` raises
            `RSafeViolationError`.
        violation_message: The refusal's text.
        on_violation: Called with what was judged and the verdict, for each violation.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """

    check_input: bool = True
    check_output: bool = True
    check_tool_calls: bool = True
    check_tool_results: bool = True
    violation_message: str = REFUSAL

    _judge: Judge = PrivateAttr()
    # Results that were judged already, by where they are: each of them is still there.
    _seen: weakref.WeakValueDictionary[int, ToolOutput] = PrivateAttr(
        default_factory=weakref.WeakValueDictionary
    )

    def __init__(
        self,
        *args: Any,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        exit_behavior: EngineExitBehavior = "replace",
        on_violation: OnViolation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{"streaming": False, **kwargs})
        if self.streaming:
            raise SettingsError(
                "RSafeFunctionAgent judges an answer before anybody sees it: leave streaming False."
            )
        if self.output_cls is not None:
            raise SettingsError(
                "RSafeFunctionAgent can't judge what output_cls generates: use structured_output_fn instead."
            )
        self._judge = Judge(
            guard,
            exit_behavior=exit_behavior,
            violation_message=self.violation_message,
            on_violation=on_violation,
            stream_window=None,
        )

    @property
    def guard(self) -> Guard:
        """The guard that judges."""
        return self._judge.guard

    async def take_step(
        self,
        ctx: AgentContext,
        llm_input: list[ChatMessage],
        tools: Sequence[AsyncBaseTool],
        memory: BaseMemory,
    ) -> AgentOutput:
        """One step of the agent: the user's messages, if it is the first, and the model's answer are judged."""
        scratchpad = await ctx.store.get(self.scratchpad_key, default=[])
        if not scratchpad and self.check_input and await self._is_input_blocked(llm_input, memory):
            return await self._refusal(ctx, [])
        output = await super().take_step(ctx, llm_input, tools, memory)
        asked = self._asked_of_output(output, turns_of([*llm_input, *scratchpad]))
        if await self._judge.acheck(asked):
            return await self._refusal(ctx, scratchpad)
        return output

    async def _is_input_blocked(self, llm_input: Sequence[ChatMessage], memory: BaseMemory) -> bool:
        """Whether what the user says is blocked; then the agent forgets it."""
        conversation = said_of(llm_input)
        asked = parts(conversation, self.guard.policy) if conversation else []
        if await self._judge.acheck(asked) is None:
            return False
        first = min(number for one in asked for number in one.messages)
        remembered = await memory.aget_all()
        await memory.aset(remembered[: max(0, len(remembered) - len(conversation) + first)])
        return True

    def _asked_of_output(self, output: AgentOutput, history: tuple[Turn, ...]) -> list[Part]:
        asked = asked_of_message("response", output.response, history) if self.check_output else []
        if self.check_tool_calls:
            for call in output.tool_calls:
                content = Content.tool_call(call.tool_name, call.tool_kwargs)
                asked.append(part(Content("tool_call", content.text, content.context, history)))
        return asked

    async def _refusal(self, ctx: AgentContext, scratchpad: list[ChatMessage]) -> AgentOutput:
        """The refusal as the agent's answer, and in the place of the answer in what the agent remembers."""
        message = ChatMessage(self.violation_message, role=MessageRole.ASSISTANT)
        await ctx.store.set(self.scratchpad_key, [*scratchpad, message])
        return AgentOutput(response=message, tool_calls=[], raw=None, current_agent_name=self.name)

    async def _get_llm_response(
        self, ctx: Context, llm_input: list[ChatMessage], llm: LLM | None = None
    ) -> ChatResponse:
        """What the model answers when the agent has to stop early, judged."""
        response = await super()._get_llm_response(ctx, llm_input, llm)
        asked = (
            asked_of_message("response", response.message, turns_of(llm_input)) if self.check_output else []
        )
        if await self._judge.acheck(asked):
            return ChatResponse(message=ChatMessage(self.violation_message, role=MessageRole.ASSISTANT))
        return response

    async def _call_tool(self, ctx: Context, tool: AsyncBaseTool, tool_input: dict[str, Any]) -> ToolOutput:
        """Runs a tool, and judges its result before it becomes an event."""
        output = await super()._call_tool(ctx, tool, tool_input)
        return (await self._judged_results([output]))[0] if self.check_tool_results else output

    async def handle_tool_call_results(
        self, ctx: Context, results: list[ToolCallResult], memory: BaseMemory
    ) -> None:
        """Takes the results of one turn; those that an `AgentWorkflow` has brought are judged as one batch."""
        if self.check_tool_results:
            judged = await self._judged_results([result.tool_output for result in results])
            for result, output in zip(results, judged, strict=True):
                result.tool_output = output
        await super().handle_tool_call_results(ctx, results, memory)

    async def _judged_results(self, outputs: list[ToolOutput]) -> list[ToolOutput]:
        fresh = [output for output in outputs if self._seen.get(id(output)) is not output]
        refused: dict[int, ToolOutput] = {}
        asked = [_asked_of_result(output) for output in fresh]
        if violation := await self._judge.acheck(asked):
            blocked = [
                output for output, is_blocked in zip(fresh, violation.blocked, strict=True) if is_blocked
            ]
            refused = {id(output): self._refused_result(output) for output in blocked}
        judged = [refused.get(id(output), output) for output in outputs]
        self._seen.update((id(output), output) for output in judged)
        return judged

    def _refused_result(self, output: ToolOutput) -> ToolOutput:
        return ToolOutput(
            content=self.violation_message,
            tool_name=output.tool_name,
            raw_input=output.raw_input,
            raw_output=None,
            is_error=True,
        )


def _asked_of_result(output: ToolOutput) -> Part:
    said = text_of(blocks_of(output.blocks))
    return Part("tool_result", said.unreadable or Content("tool_result", said.text, output.tool_name), ())
