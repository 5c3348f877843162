"""The guard in LangChain's agents."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Annotated, Any, Literal, NotRequired
from uuid import uuid4

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
    ToolCallRequest,
    hook_config,
)
from langchain.agents.structured_output import MultipleStructuredOutputsError, StructuredOutputValidationError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, RemoveMessage, ToolCall, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt

from rsafe_plugins.errors import PolicyError, SettingsError
from rsafe_plugins.guard import Guard, GuardSettings, Verdict
from rsafe_plugins.guard.texts import Part, acheck_many, check_many, worst
from rsafe_plugins.guard.violation import REFUSAL, RSafeViolationError, mark_of
from rsafe_plugins.langchain.content import reply_parts, result_part, text_shown, to_parts
from rsafe_plugins.policy import ContentKind

AgentExitBehavior = Literal["end", "replace", "error", "interrupt"]
OnViolation = Callable[[ContentKind, Verdict], None]

_Misshapen = MultipleStructuredOutputsError | StructuredOutputValidationError
_MISSHAPEN = (MultipleStructuredOutputsError, StructuredOutputValidationError)

MARK = "rsafe"
"""The key in `response_metadata` of a message that stands in the place of a blocked one."""

_NO_STREAM = "nostream"  # LangGraph's tag for models whose tokens stay out of `stream_mode="messages"`
_CHECKS: Mapping[str, ContentKind] = {
    "check_input": "prompt",
    "check_output": "response",
    "check_tool_calls": "tool_call",
    "check_tool_results": "tool_result",
}


def _merged(held: Mapping[str, Any] | None, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is held, after an update; None drops all of it."""
    return {} if more is None else {**(held or {}), **more}


class RSafeState(AgentState[Any]):
    """An agent's state with what waits for a person's decision, by the message's id."""

    rsafe_held: NotRequired[Annotated[dict[str, Any] | None, PrivateStateAttr, _merged]]


@dataclass(frozen=True, slots=True)
class _Violation:
    stage: ContentKind
    verdict: Verdict

    @property
    def mark(self) -> dict[str, Any]:
        return mark_of(self.stage, self.verdict)


class RSafeMiddleware(AgentMiddleware[RSafeState, Any, Any]):
    r"""Keeps an agent's input, its answers, its tool calls and its tools' results to a policy.

    What is unsafe reaches neither the user nor the agent's state: no stream mode of the agent and no checkpoint
    holds an answer, a tool call's arguments or a tool's result that was not found safe. So answers arrive as
    whole messages, not token by token. A blocked tool never runs.

    Put it last in the list of middleware: then it judges what the model that is really called answers.

    Args:
        guard: A `Guard`, or the settings to make one; None for `Guard()`.
        check_input: Judge the user's messages, once when the agent starts.
        check_output: Judge each answer of the model, a structured one too.
        check_tool_calls: Judge the tool calls of each answer, with the answer as one engine batch.
        check_tool_results: Judge what each tool brings.
        exit_behavior: What a violation does. `end` (the default): the agent ends with the refusal. `replace`: the
            refusal takes the place of what was blocked, and the agent goes on; a blocked tool call is answered by
            it. `error`: `RSafeViolationError` is raised. `interrupt`: a person is asked, see below.
        violation_message: The refusal's text.
        on_violation: Called with what was judged and the verdict, for each violation; what it raises ends the
            agent.

    With `interrupt` the agent, which needs a checkpointer, stops with an interrupt whose value holds `stage`,
    `content` and `verdict`. `Command(resume="approve")` lets what was blocked pass; anything else refuses it, as
    `end` does. Only while it waits, what was blocked is held in the agent's private state.

    Several of them with policies of their own can work in one agent.

    Raises:
        SettingsError: A setting can't be used, or something is to be checked that the policy has no category for.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.

    Example:
        >>> from langchain.agents import create_agent
        >>> agent = create_agent("openai:gpt-5", tools=[], middleware=[RSafeMiddleware()])
    """

    state_schema = RSafeState

    def __init__(
        self,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        *,
        check_input: bool = True,
        check_output: bool = True,
        check_tool_calls: bool = True,
        check_tool_results: bool = True,
        exit_behavior: AgentExitBehavior = "end",
        violation_message: str = REFUSAL,
        on_violation: OnViolation | None = None,
    ) -> None:
        super().__init__()
        self.guard = Guard.of(guard)
        self.check_input = check_input
        self.check_output = check_output
        self.check_tool_calls = check_tool_calls
        self.check_tool_results = check_tool_results
        self.exit_behavior = exit_behavior
        self.violation_message = violation_message
        self.on_violation = on_violation
        if exit_behavior not in ("end", "replace", "error", "interrupt"):
            raise SettingsError(
                f"exit_behavior must be end, replace, error or interrupt, not {exit_behavior!r}."
            )
        for check, kind in _CHECKS.items():
            if getattr(self, check):
                self._need_category(check, kind)

    def _need_category(self, check: str, kind: ContentKind) -> None:
        try:
            self.guard.policy.for_kind(kind)
        except PolicyError:
            raise SettingsError(
                f"The policy {self.guard.policy.name!r} has no category that applies to a {kind}: set "
                f"{check}=False, or choose another policy."
            ) from None

    @property
    def name(self) -> str:
        """The middleware's name in the agent; each policy and set of checks has its own."""
        checks = [check for check in _CHECKS if getattr(self, check)]
        parts = [type(self).__name__, self.guard.policy.name]
        if len(checks) < len(_CHECKS):
            parts += [check.removeprefix("check_") for check in checks]
        # It becomes part of the names of nodes, which don't take every character.
        return re.sub(r"[^\w.-]", "_", "-".join(parts))

    # The user's messages, when the agent starts.

    @hook_config(can_jump_to=["end"])
    def before_agent(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Judges the user's messages."""
        asked = self._asked_of_input(state)
        return self._after_input(state, asked, check_many(self.guard, [part.content for part in asked]))

    @hook_config(can_jump_to=["end"])
    async def abefore_agent(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Like `before_agent`, without blocking the event loop."""
        asked = self._asked_of_input(state)
        verdicts = await acheck_many(self.guard, [part.content for part in asked])
        return self._after_input(state, asked, verdicts)

    def _asked_of_input(self, state: RSafeState) -> list[Part]:
        messages = state["messages"]
        return to_parts(messages, "prompt", self.guard.policy) if self.check_input and messages else []

    def _after_input(
        self, state: RSafeState, asked: Sequence[Part], verdicts: Sequence[Verdict]
    ) -> dict[str, Any] | None:
        update: dict[str, Any] = {"rsafe_held": None} if state.get("rsafe_held") else {}
        blocked = [part for part, verdict in zip(asked, verdicts, strict=True) if verdict.blocked]
        if not blocked:
            return update or None
        decides = worst(verdicts)
        violation = self._report(asked[decides].kind, verdicts[decides])
        messages = [state["messages"][index] for part in blocked for index in part.messages]
        if self.exit_behavior == "interrupt":
            shown = "\n\n".join(text_shown(message) for message in messages)
            if _is_approved(interrupt(_question(violation, shown))):
                return update or None
        if self.exit_behavior == "replace":
            return {**update, "messages": [self._in_place_of(message, violation) for message in messages]}
        gone = [RemoveMessage(id=str(message.id)) for message in messages]
        return {**update, "messages": [*gone, self._refusal(violation)], "jump_to": "end"}

    # The model's answers and tool calls.

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Judges what the model answers, before anybody else sees it."""
        if not (self.check_output or self.check_tool_calls):
            return handler(request)
        response, failure = None, None
        try:
            response = handler(_quiet(request))
        except _MISSHAPEN as error:
            failure = error
        asked = self._asked_of_reply(request, response, failure)
        verdicts = check_many(self.guard, [part.content for part, _ in asked])
        return self._after_reply(response, failure, asked, verdicts)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Like `wrap_model_call`, without blocking the event loop."""
        if not (self.check_output or self.check_tool_calls):
            return await handler(request)
        response, failure = None, None
        try:
            response = await handler(_quiet(request))
        except _MISSHAPEN as error:
            failure = error
        asked = self._asked_of_reply(request, response, failure)
        verdicts = await acheck_many(self.guard, [part.content for part, _ in asked])
        return self._after_reply(response, failure, asked, verdicts)

    def _asked_of_reply(
        self,
        request: ModelRequest[Any],
        response: ModelResponse[Any] | None,
        failure: _Misshapen | None,
    ) -> list[tuple[Part, ToolCall | None]]:
        """What of the answer is judged; a tool call with the part that stands for it."""
        tools = {tool.name for tool in request.tools if isinstance(tool, BaseTool)}
        asked = []
        for reply in _replies(response, failure):
            # What calls no tool of the agent is a structured answer.
            calls = [
                call for call in reply.tool_calls if request.response_format is None or call["name"] in tools
            ]
            for part, call in reply_parts(request.messages, reply, calls):
                if self.check_output if call is None else self.check_tool_calls:
                    asked.append((part, call))
        return asked

    def _after_reply(
        self,
        response: ModelResponse[Any] | None,
        failure: _Misshapen | None,
        asked: Sequence[tuple[Part, ToolCall | None]],
        verdicts: Sequence[Verdict],
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        blocked = [call for (_, call), verdict in zip(asked, verdicts, strict=True) if verdict.blocked]
        if not blocked:
            if failure is not None:
                raise failure
            assert response is not None
            return response
        decides = worst(verdicts)
        violation = self._report(asked[decides][0].kind, verdicts[decides])
        reply, *more = _replies(response, failure)
        are_calls = all(call is not None for call in blocked)
        if self.exit_behavior == "replace" and are_calls and not more:
            ids = [call["id"] for call in blocked if call is not None]
            return ModelResponse(result=[_without_arguments(reply, ids, violation)])
        if self.exit_behavior == "interrupt" and response is not None:
            # The refusal has its id, so that an approved answer takes its place.
            reply.id = reply.id or str(uuid4())
            refused = self._refusal(violation, reply.id)
            held = {"messages": response.result, "structured_response": response.structured_response}
            update = {"rsafe_held": {reply.id: {**held, "question": _question(violation, text_shown(reply))}}}
            return ExtendedModelResponse(ModelResponse(result=[refused]), Command(update=update))
        return ModelResponse(result=[self._refusal(violation, reply.id)], structured_response=None)

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Ends the agent behind a refusal, or asks a person."""
        held = state.get("rsafe_held")
        if held:
            (one,) = held.values()
            if _is_approved(interrupt(one["question"])):
                approved = {"messages": one["messages"], "rsafe_held": None}
                if one["structured_response"] is not None:
                    approved["structured_response"] = one["structured_response"]
                return approved
            return {"rsafe_held": None, "jump_to": "end"}
        # An agent with a structured answer would ask its model again for what is missing.
        last = state["messages"][-1] if state["messages"] else None
        is_refusal = isinstance(last, AIMessage) and not last.tool_calls and MARK in last.response_metadata
        return {"jump_to": "end"} if is_refusal and self.exit_behavior != "error" else None

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `after_model`."""
        return self.after_model(state, runtime)

    # The tools.

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Runs no blocked tool, and judges what a tool brings."""
        if refused := self._refused_call(request):
            return refused
        result = handler(request)
        asked = self._asked_of_result(request, result)
        return self._after_result(result, asked, check_many(self.guard, [part.content for part, _ in asked]))

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        """Like `wrap_tool_call`, without blocking the event loop."""
        if refused := self._refused_call(request):
            return refused
        result = await handler(request)
        asked = self._asked_of_result(request, result)
        verdicts = await acheck_many(self.guard, [part.content for part, _ in asked])
        return self._after_result(result, asked, verdicts)

    def _refused_call(self, request: ToolCallRequest) -> ToolMessage | None:
        call = request.tool_call
        for message in reversed(_messages(request.state)):
            if isinstance(message, AIMessage):
                mark = message.response_metadata.get(MARK, {})
                if call["id"] in mark.get("blocked_calls", ()):
                    return self._result(call["name"], str(call["id"]), mark)
                break
        return None

    def _asked_of_result(
        self, request: ToolCallRequest, result: ToolMessage | Command[Any]
    ) -> list[tuple[Part, ToolMessage]]:
        if not self.check_tool_results:
            return []
        history = _messages(request.state)
        return [(result_part(history, message), message) for message in _tool_messages(result)]

    def _after_result(
        self,
        result: ToolMessage | Command[Any],
        asked: Sequence[tuple[Part, ToolMessage]],
        verdicts: Sequence[Verdict],
    ) -> ToolMessage | Command[Any]:
        refused: dict[int, ToolMessage] = {}
        held: dict[str, Any] = {}
        for (_, message), verdict in zip(asked, verdicts, strict=True):
            if verdict.blocked:
                violation = self._report("tool_result", verdict)
                if self.exit_behavior == "interrupt":
                    message.id = message.id or str(uuid4())
                    question = _question(violation, text_shown(message))
                    held[message.id] = {
                        "messages": [message],
                        "structured_response": None,
                        "question": question,
                    }
                mark = violation.mark
                refused[id(message)] = self._result(message.name, message.tool_call_id, mark, message.id)
        if not refused:
            return result
        if isinstance(result, ToolMessage):
            message = refused[id(result)]
            return Command(update={"messages": [message], "rsafe_held": held}) if held else message
        update = dict(_update(result))
        update["messages"] = [refused.get(id(message), message) for message in update["messages"]]
        return replace(result, update={**update, "rsafe_held": held} if held else update)

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Ends the agent behind a tool's blocked result, or asks a person."""
        update: dict[str, Any] = {}
        if held := state.get("rsafe_held"):
            # All are asked for, in the same order at each resumption.
            approved = [_is_approved(interrupt(one["question"])) for one in held.values()]
            update["rsafe_held"] = None
            update["messages"] = [
                message
                for one, passes in zip(held.values(), approved, strict=True)
                if passes
                for message in one["messages"]
            ]
            if all(approved):
                return update
        elif self.exit_behavior != "end":
            return None
        blocked = _blocked_result(state["messages"])
        if blocked is None:
            return update or None
        refusal = AIMessage(self.violation_message, response_metadata={MARK: blocked})
        return {**update, "messages": [*update.get("messages", ()), refusal], "jump_to": "end"}

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `before_model`."""
        return self.before_model(state, runtime)

    # What stands in the place of what was blocked.

    def _report(self, stage: ContentKind, verdict: Verdict) -> _Violation:
        if self.on_violation is not None:
            self.on_violation(stage, verdict)
        if self.exit_behavior == "error":
            raise RSafeViolationError(stage, verdict)
        return _Violation(stage, verdict)

    def _refusal(self, violation: _Violation, identifier: str | None = None) -> AIMessage:
        return AIMessage(self.violation_message, id=identifier, response_metadata={MARK: violation.mark})

    def _in_place_of(self, message: BaseMessage, violation: _Violation) -> BaseMessage:
        if isinstance(message, ToolMessage):
            return self._result(message.name, message.tool_call_id, violation.mark, message.id)
        return type(message)(
            content=self.violation_message, id=message.id, response_metadata={MARK: violation.mark}
        )

    def _result(
        self, name: str | None, call: str, mark: Mapping[str, Any], identifier: str | None = None
    ) -> ToolMessage:
        return ToolMessage(
            self.violation_message,
            name=name,
            tool_call_id=call,
            id=identifier,
            status="error",
            response_metadata={MARK: dict(mark)},
        )


def _quiet(request: ModelRequest[Any]) -> ModelRequest[Any]:
    """The same request to a model whose tokens nobody sees as they come."""
    model = request.model
    if not isinstance(model, BaseChatModel):
        raise SettingsError(
            f"RSafeMiddleware can keep the tokens of a chat model out of streams, not those of a "
            f"{type(model).__name__}: give the agent a chat model, without configurable fields."
        )
    tags = [*(model.tags or ()), _NO_STREAM]
    return request.override(model=model.model_copy(update={"tags": tags}))


def _replies(response: ModelResponse[Any] | None, failure: _Misshapen | None) -> list[AIMessage]:
    """The model's own messages; also of an answer that didn't have the wanted structure, which the error quotes."""
    if response is not None:
        return [message for message in response.result if isinstance(message, AIMessage)]
    return [failure.ai_message] if failure is not None else []


def _without_arguments(reply: AIMessage, ids: Sequence[str | None], violation: _Violation) -> AIMessage:
    """The answer with nothing but names in the place of blocked calls; of its content only the text."""
    calls = [{**call, "args": {}} if call["id"] in ids else call for call in reply.tool_calls]
    mark = {**violation.mark, "blocked_calls": list(ids)}
    return AIMessage(
        reply.text, id=reply.id, name=reply.name, tool_calls=calls, response_metadata={MARK: mark}
    )


def _question(violation: _Violation, content: str) -> dict[str, Any]:
    """What a person is asked."""
    verdict = violation.verdict.model_dump(mode="json", exclude={"usage"})
    return {"stage": violation.stage, "content": content, "verdict": verdict}


def _is_approved(decision: Any) -> bool:
    return (decision.get("type") if isinstance(decision, Mapping) else decision) == "approve"


def _blocked_result(messages: Sequence[BaseMessage]) -> Mapping[str, Any] | None:
    """The mark of a blocked result of the last turn; None where there is none."""
    results = takewhile(lambda message: isinstance(message, ToolMessage), reversed(messages))
    marks = (message.response_metadata.get(MARK) for message in results)
    return next(filter(None, marks), None)


def _messages(state: Any) -> list[AnyMessage]:
    messages = state.get("messages", ()) if isinstance(state, Mapping) else getattr(state, "messages", ())
    return list(messages)


def _update(command: Command[Any]) -> Mapping[str, Any]:
    """What a tool's command changes in the agent's state."""
    update = command.update
    if update is None:
        return {}
    if not isinstance(update, Mapping):
        raise TypeError(
            "RSafeMiddleware judges the messages in a tool's Command, whose update must be a mapping, "
            f"not {type(update).__name__}."
        )
    return update


def _tool_messages(result: ToolMessage | Command[Any]) -> list[ToolMessage]:
    messages = [result] if isinstance(result, ToolMessage) else _update(result).get("messages", ())
    return [message for message in messages if isinstance(message, ToolMessage)]
