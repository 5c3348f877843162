"""An agent behind the guard."""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.agent.workflow import AgentOutput, FunctionAgent, ToolCallResult
from llama_index.core.agent.workflow.agent_context import AgentContext
from llama_index.core.llms import LLM, ChatMessage, ChatResponse, MessageRole
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.tools import AsyncBaseTool, ToolOutput
from llama_index.core.workflow import Context
from pydantic import PrivateAttr

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard import Content, Guard, GuardSettings
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.texts import Part, contents_of, parts, text_of
from rsafe_plugins.guard.violation import REFUSAL, OnViolation
from rsafe_plugins.llama_index.judging import (
    DEVELOPERS,
    EngineExitBehavior,
    Judge,
    asked_of_message,
    blocks_of,
    part,
    said_of,
    turns_of,
)

# What LlamaIndex hands on to its workflow, beside the agent's own.
_OF_WORKFLOWS = ("service_manager", "resource_manager", "num_concurrent_runs")


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
        TypeError: It takes no such argument.
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
    # Results that were judged already, by where they are: the object, and what it said then.
    _seen: dict[int, tuple[weakref.ref[ToolOutput], bytes]] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        *args: Any,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        exit_behavior: EngineExitBehavior = "replace",
        on_violation: OnViolation | None = None,
        **kwargs: Any,
    ) -> None:
        # LlamaIndex passes over what it doesn't know.
        known = {
            *type(self).model_fields,
            *inspect.signature(FunctionAgent.__init__).parameters,
            *_OF_WORKFLOWS,
        }
        if strange := sorted(kwargs.keys() - known):
            raise TypeError(
                f"RSafeFunctionAgent takes no {', '.join(strange)}; settings of the guard are given as guard={{...}}."
            )
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
        self._judge.need(
            check_input="prompt" if self.check_input else None,
            check_output="response" if self.check_output else None,
            check_tool_calls="tool_call" if self.check_tool_calls else None,
            check_tool_results="tool_result" if self.check_tool_results else None,
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
        """One step of the agent: what of the user's this agent hasn't judged, and the model's answer are judged."""
        await self._refuse_early_answers(ctx)
        # What a run that broke off has left there belongs to no conversation.
        is_first = await ctx.store.get("num_iterations", default=None) == 0
        before = [] if is_first else [*await ctx.store.get(self.scratchpad_key, default=[])]
        await ctx.store.set(self.scratchpad_key, [*before])
        try:
            if self.check_input and (is_first or await self._is_new(ctx, llm_input)):
                if await self._is_input_blocked(llm_input, memory):
                    return await self._refusal(ctx, before)
                await ctx.store.set(self._judged_key, _digest_of_user(llm_input))
            output = await super().take_step(ctx, llm_input, tools, memory)
            blocked = await self._judge.acheck(self._asked_of_output(output, turns_of([*llm_input, *before])))
        except BaseException:
            await ctx.store.set(self.scratchpad_key, before)
            raise
        return await self._refusal(ctx, before) if blocked else output

    @property
    def _judged_key(self) -> str:
        # The store takes dots in a key for a path, and names may have some.
        return f"rsafe_judged_{self.name.encode('utf-8').hex()}"

    async def _is_new(self, ctx: AgentContext, llm_input: Sequence[ChatMessage]) -> bool:
        """Whether the user has said something that this agent hasn't judged, as another agent may hand it over."""
        return bool(await ctx.store.get(self._judged_key, default=None) != _digest_of_user(llm_input))

    async def _refuse_early_answers(self, ctx: AgentContext) -> None:
        # An `AgentWorkflow` asks the model by itself then, and nobody judges what it says.
        in_workflow = bool(await ctx.store.get("agents", default=None))
        if in_workflow and await ctx.store.get("early_stopping_method", default="force") == "generate":
            raise SettingsError(
                "RSafeFunctionAgent can't judge what an AgentWorkflow generates when it stops early: leave "
                "early_stopping_method at force there."
            )

    async def _is_input_blocked(self, llm_input: Sequence[ChatMessage], memory: BaseMemory) -> bool:
        """Whether what the user says is blocked; then the agent forgets it."""
        conversation = said_of(llm_input)
        asked = parts(conversation, self.guard.policy) if conversation else []
        try:
            blocked = await self._judge.acheck(asked) is not None
        except BaseException:
            await self._forget(llm_input, asked, memory)
            raise
        if blocked:
            await self._forget(llm_input, asked, memory)
        return blocked

    async def _forget(
        self, llm_input: Sequence[ChatMessage], asked: Sequence[Part], memory: BaseMemory
    ) -> None:
        """Takes all from the first judged message on out of the memory."""
        spoken = [n for n, message in enumerate(llm_input) if message.role not in DEVELOPERS]
        first = spoken[min(number for one in asked for number in one.messages)]
        gone = len(llm_input) - first
        if not isinstance(memory, Memory):
            remembered = await memory.aget_all()
            await memory.aset(remembered[: max(0, len(remembered) - gone)])
            return
        # What it has archived its blocks have already, and would get again.
        archived = await memory.aget_all(MessageStatus.ARCHIVED)
        active = await memory.aget_all(MessageStatus.ACTIVE)
        await memory.sql_store.set_messages(memory.session_id, archived, MessageStatus.ARCHIVED)
        if kept := active[: max(0, len(active) - gone)]:
            await memory.sql_store.add_messages(memory.session_id, kept)

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
        is_answer = tool.metadata.return_direct and self.check_output
        return (await self._judged_results([output]))[0] if self.check_tool_results or is_answer else output

    async def handle_tool_call_results(
        self, ctx: Context, results: list[ToolCallResult], memory: BaseMemory
    ) -> None:
        """Takes the results of one turn; those that an `AgentWorkflow` has brought are judged as one batch."""
        mine = [
            result
            for result in results
            if self.check_tool_results or (result.return_direct and self.check_output)
        ]
        judged = await self._judged_results([result.tool_output for result in mine])
        for result, output in zip(mine, judged, strict=True):
            result.tool_output = output
        await super().handle_tool_call_results(ctx, results, memory)

    async def _judged_results(self, outputs: list[ToolOutput]) -> list[ToolOutput]:
        fresh = [output for output in outputs if not self._was_judged(output)]
        asked = [(output, one) for output in fresh for one in _asked_of_result(output)]
        refused: dict[int, ToolOutput] = {}
        if violation := await self._judge.acheck([one for _, one in asked]):
            for (output, _), is_blocked in zip(asked, violation.blocked, strict=True):
                if is_blocked:
                    refused[id(output)] = self._refused_result(output)
        judged = [refused.get(id(output), output) for output in outputs]
        for output in judged:
            self._remember(output)
        return judged

    def _was_judged(self, output: ToolOutput) -> bool:
        known = self._seen.get(id(output))
        return known is not None and known[0]() is output and known[1] == _digest(output)

    def _remember(self, output: ToolOutput) -> None:
        key = id(output)
        self._seen[key] = (weakref.ref(output, lambda _: self._seen.pop(key, None)), _digest(output))

    def _refused_result(self, output: ToolOutput) -> ToolOutput:
        return ToolOutput(
            content=self.violation_message,
            tool_name=output.tool_name,
            raw_input=output.raw_input,
            raw_output=None,
            is_error=True,
        )


def _asked_of_result(output: ToolOutput) -> list[Part]:
    """What a tool says, and the nodes that it says it from: they go with it to whoever reads the events."""
    said = text_of(blocks_of(output.blocks))
    judged = contents_of(said, "tool_result", output.tool_name)
    nodes = getattr(output.raw_output, "source_nodes", None) or []
    texts = (node.get_content(metadata_mode="all") for node in nodes)
    found = [Content("tool_result", text, output.tool_name) for text in texts if text not in said.text]
    return [Part("tool_result", one, ()) for one in (*judged, *found)]


def _digest_of_user(messages: Sequence[ChatMessage]) -> str:
    said = repr([one.said for one in said_of(messages) if one.kind == "prompt"])
    return hashlib.blake2b(said.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _digest(output: ToolOutput) -> bytes:
    said = repr((output.blocks, [one.content for one in _asked_of_result(output)]))
    return hashlib.blake2b(said.encode("utf-8", "replace")).digest()
