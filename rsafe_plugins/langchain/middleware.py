"""The guard in LangChain's agents."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
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
from langchain.agents.structured_output import (
    MultipleStructuredOutputsError,
    ProviderStrategy,
    StructuredOutputValidationError,
    ToolStrategy,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    ToolCall,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import set_config_context, var_child_runnable_config
from langgraph.errors import GraphBubbleUp, ParentCommand
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt

from rsafe_plugins.errors import RSafeError, SettingsError
from rsafe_plugins.guard import Guard, GuardSettings, Verdict
from rsafe_plugins.guard.texts import Part, acheck_many, check_many, worst
from rsafe_plugins.guard.violation import (
    REFUSAL,
    OnViolation,
    RSafeViolationError,
    mark_of,
    need_categories,
)
from rsafe_plugins.langchain.content import (
    is_prompt,
    is_spoken,
    message_parts,
    reply_parts,
    result_parts,
    text_shown,
    to_parts,
)
from rsafe_plugins.policy import ContentKind

AgentExitBehavior = Literal["end", "replace", "error", "interrupt"]

_Misshapen = MultipleStructuredOutputsError | StructuredOutputValidationError
_MISSHAPEN = (MultipleStructuredOutputsError, StructuredOutputValidationError)

MARK = "rsafe"
"""The key in `response_metadata` of a message that stands in the place of a blocked one."""

_IN_PLACE = "in_place"  # in a mark: the message was given to the agent, and is none of its own
_NO_STREAM = "nostream"  # LangGraph's tag for models whose tokens stay out of `stream_mode="messages"`
_NAMED_BY_CHANCE = re.compile(r"response_format_[0-9a-f]{4}")  # LangChain's name for a schema without a title
_CHECKS: Mapping[str, ContentKind] = {
    "check_input": "prompt",
    "check_output": "response",
    "check_tool_calls": "tool_call",
    "check_tool_results": "tool_result",
}


def _merged(kept: Mapping[str, Any] | None, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is kept, after an update; a value of None drops its key, and None drops all."""
    if more is None:
        return {}
    return {key: value for key, value in {**(kept or {}), **more}.items() if value is not None}


class RSafeState(AgentState[Any]):
    """An agent's state with what the middleware keeps there for itself.

    Attributes:
        rsafe_held: What waits for a person's decision, by who holds it and the message's id.
        rsafe_seen: The user's messages that were judged: a digest of each, by who judged it and its id.
        rsafe_error: The violation that the agent is about to end with, by who found it.
    """

    rsafe_held: NotRequired[Annotated[dict[str, Any] | None, PrivateStateAttr, _merged]]
    rsafe_seen: NotRequired[Annotated[dict[str, str] | None, PrivateStateAttr, _merged]]
    rsafe_error: NotRequired[Annotated[dict[str, Any] | None, PrivateStateAttr, _merged]]


@dataclass(frozen=True, slots=True)
class _Violation:
    stage: ContentKind
    verdict: Verdict


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
        name: Tells it from another one with the same policy and checks in one agent. Give it the same one each time
            that an agent goes on from a checkpoint.

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
        name: str | None = None,
    ) -> None:
        super().__init__()
        self._name = name
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
        need_categories(self.guard, {check: kind for check, kind in _CHECKS.items() if getattr(self, check)})

    @property
    def name(self) -> str:
        """The middleware's name in the agent; each policy, or name that was given, and set of checks has its own."""
        checks = [check for check in _CHECKS if getattr(self, check)]
        parts = [type(self).__name__, self._name or self.guard.policy.name]
        if len(checks) < len(_CHECKS):
            parts += [check.removeprefix("check_") for check in checks]
        # It becomes part of the names of nodes, which don't take every character.
        return re.sub(r"[^\w.-]", "_", "-".join(parts))

    # The user's messages: when the agent starts, and those that come later.

    def before_agent(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Judges the user's messages."""
        asked = self._asked_of_input(state, is_start=True)
        verdicts = check_many(self.guard, [part.content for part in asked])
        return {**self._forgotten(state), **self._after_input(state, asked, verdicts)}

    async def abefore_agent(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Like `before_agent`, without blocking the event loop."""
        asked = self._asked_of_input(state, is_start=True)
        verdicts = await acheck_many(self.guard, [part.content for part in asked])
        return {**self._forgotten(state), **self._after_input(state, asked, verdicts)}

    def _forgotten(self, state: RSafeState) -> dict[str, Any]:
        """Drops what an earlier run that broke off has left of ours."""
        mine = [key for key in state.get("rsafe_held") or () if key.startswith(f"{self.name}/")]
        return {"rsafe_error": {self.name: None}, "rsafe_held": dict.fromkeys(mine)}

    def _asked_of_input(self, state: RSafeState, *, is_start: bool) -> list[Part]:
        """At the start all from the last prompt on; and whatever message of the user nobody has judged."""
        messages = state["messages"]
        if not self.check_input or not any(map(is_spoken, messages)):
            return []
        seen = state.get("rsafe_seen")
        # Without any seen, this run hasn't come by its start: another middleware may have jumped over it.
        asked = to_parts(messages, "prompt", self.guard.policy) if is_start or seen is None else []
        if seen is None:
            # What came before in the first conversation is shown with what is judged.
            return asked
        covered = {number for part in asked for number in part.messages}
        fresh = [
            number
            for number, message in enumerate(messages)
            if is_prompt(message)
            and number not in covered
            and seen.get(self._key(message)) != _digest(message)
        ]
        return [*(part for number in fresh for part in message_parts(messages, number)), *asked]

    def _key(self, message: BaseMessage) -> str:
        """Several middlewares keep what each of them has seen in one state."""
        return f"{self.name}/{message.id}"

    def _after_input(
        self, state: RSafeState, asked: Sequence[Part], verdicts: Sequence[Verdict]
    ) -> dict[str, Any]:
        """What becomes of what was judged. Nothing is raised and nobody is asked here: the messages must go first."""
        messages = state["messages"]
        seen = {self._key(message): _digest(message) for message in messages if is_prompt(message)}
        update: dict[str, Any] = {"rsafe_seen": seen} if self.check_input else {}
        blocked = [part for part, verdict in zip(asked, verdicts, strict=True) if verdict.blocked]
        if not blocked:
            return update
        decides = worst(verdicts)
        violation = _Violation(asked[decides].kind, verdicts[decides])
        self._tell(violation)
        gone = [
            messages[number] for number in dict.fromkeys(one for part in blocked for one in part.messages)
        ]
        placed = [self._in_place_of(message, violation) for message in gone]
        update["rsafe_seen"] = {**seen, **{self._key(one): _digest(one) for one in placed}}
        if self.exit_behavior == "interrupt":
            shown = "\n\n".join(map(text_shown, gone))
            held = {"messages": gone, "structured_response": None, "question": _question(violation, shown)}
            return {**update, "messages": placed, "rsafe_held": {self._key(gone[0]): held}}
        if self.exit_behavior == "replace":
            return {**update, "messages": placed}
        verdict = violation.verdict.model_dump(mode="json")
        ending = {"stage": violation.stage, "verdict": verdict}
        return {**update, "messages": placed, "rsafe_error": {self.name: ending}}

    # The model's answers and tool calls.

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Judges what the model answers, before anybody else sees it."""
        if not (self.check_output or self.check_tool_calls):
            return handler(request)
        response, failure = None, None
        try:
            with set_config_context(_quiet_config()) as context, _quiet(request) as quiet:
                response = context.run(handler, quiet)
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
            token = var_child_runnable_config.set(_quiet_config())
            try:
                with _quiet(request) as quiet:
                    response = await handler(quiet)
            finally:
                var_child_runnable_config.reset(token)
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
        is_structured = _structured_answers(request)
        asked = []
        for reply in _replies(response, failure):
            calls = [call for call in reply.tool_calls if not is_structured(call["name"])]
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
        calls = [call for call in blocked if call is not None]
        if (
            self.exit_behavior == "replace"
            and len(calls) == len(blocked)
            and not more
            and response is not None
        ):
            # Calls that have their answer are not run, whatever becomes of marks.
            mark = self._mark(violation)
            answers = [self._result(call["name"], str(call["id"]), mark) for call in calls]
            kept = [message for message in response.result if isinstance(message, ToolMessage)]
            bare = _without_arguments(reply, [call["id"] for call in calls], reply.text, mark)
            return ModelResponse([bare, *kept, *answers], response.structured_response)
        if self.exit_behavior == "interrupt" and response is not None:
            # The refusal has its id, so that an approved answer takes its place.
            reply.id = reply.id or str(uuid4())
            refused = self._refusal(violation, reply.id)
            held = {"messages": response.result, "structured_response": response.structured_response}
            question = _question(violation, text_shown(reply))
            update = {"rsafe_held": {self._key(reply): {**held, "question": question}}}
            return ExtendedModelResponse(ModelResponse(result=[refused]), Command(update=update))
        return ModelResponse(result=[self._refusal(violation, reply.id)], structured_response=None)

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Ends the agent behind a refusal, or asks a person."""
        held = state.get("rsafe_held")
        if held:
            # Where several hold a reply, one of them has the model's own and the others a refusal in its place.
            own = [one for one in held.values() if not any(map(_is_marked, one["messages"]))]
            asked = own or list(held.values())
            if all([_is_approved(interrupt(one["question"])) for one in asked]):
                approved = {"messages": asked[0]["messages"], "rsafe_held": None}
                if asked[0]["structured_response"] is not None:
                    approved["structured_response"] = asked[0]["structured_response"]
                return approved
            return {"rsafe_held": None, "jump_to": "end"}
        # An agent with a structured answer would ask its model again for what is missing.
        last = state["messages"][-1] if state["messages"] else None
        is_refusal = isinstance(last, AIMessage) and not last.tool_calls and self._is_mine(last)
        return {"jump_to": "end"} if is_refusal and self.exit_behavior != "error" else None

    def _is_mine(self, message: BaseMessage) -> bool:
        return bool(message.response_metadata.get(MARK, {}).get("by") == self.name)

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
        failure: Exception | None = None
        self._silence_models(request)
        try:
            result = handler(request)
        except ParentCommand as error:
            # A graph inside the tool hands its messages on to this one.
            result, failure = error.args[0], error
        except (GraphBubbleUp, RSafeError):
            raise
        except Exception as error:
            # Whoever is around this may make a message of what a tool raises.
            result, failure = _failed(request, error), error
        result = _normalized(result)
        asked = self._asked_of_result(request, result)
        verdicts = check_many(self.guard, [part.content for part, _ in asked])
        judged: ToolMessage | Command[Any] = self._after_result(result, asked, verdicts, failure)
        return judged

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        """Like `wrap_tool_call`, without blocking the event loop."""
        if refused := self._refused_call(request):
            return refused
        failure: Exception | None = None
        self._silence_models(request)
        try:
            result = await handler(request)
        except ParentCommand as error:
            result, failure = error.args[0], error
        except (GraphBubbleUp, RSafeError):
            raise
        except Exception as error:
            result, failure = _failed(request, error), error
        result = _normalized(result)
        asked = self._asked_of_result(request, result)
        verdicts = await acheck_many(self.guard, [part.content for part, _ in asked])
        judged: ToolMessage | Command[Any] = self._after_result(result, asked, verdicts, failure)
        return judged

    def _silence_models(self, request: ToolCallRequest) -> None:
        """Keeps the tokens of models that the tool asks out of streams: what it brings isn't judged yet."""
        if self.check_tool_results and request.runtime is not None:
            # LangGraph runs the tool with this very mapping, which is the call's own, whatever the request says then.
            config = request.runtime.config
            config["tags"] = [*(config.get("tags") or ()), _NO_STREAM]

    def _refused_call(self, request: ToolCallRequest) -> ToolMessage | None:
        call = request.tool_call
        for message in reversed(_messages(request.state)):
            if isinstance(message, AIMessage):
                mark = message.response_metadata.get(MARK, {})
                if call["id"] in mark.get("blocked_calls", ()):
                    return self._result(call["name"], str(call["id"]), mark)
                break
        return None

    def _asked_of_result(self, request: ToolCallRequest, result: Any) -> list[tuple[Part, BaseMessage]]:
        if not self.check_tool_results:
            return []
        history = _messages(request.state)
        return [(part, message) for message in _brought(result) for part in result_parts(history, message)]

    def _after_result(
        self,
        result: Any,
        asked: Sequence[tuple[Part, BaseMessage]],
        verdicts: Sequence[Verdict],
        failure: Exception | None,
    ) -> Any:
        refused: dict[int, BaseMessage] = {}
        held: dict[str, Any] = {}
        for (_, message), verdict in zip(asked, verdicts, strict=True):
            if verdict.blocked and id(message) not in refused:
                violation = self._report("tool_result", verdict)
                message.id = message.id or str(uuid4())
                if self.exit_behavior == "interrupt":
                    question = _question(violation, text_shown(message))
                    held[self._key(message)] = {
                        "messages": [message],
                        "structured_response": None,
                        "question": question,
                    }
                refused[id(message)] = self._in_place_of(message, violation)
        if refused:
            judged = _put(result, refused, held)
            if isinstance(failure, ParentCommand):
                raise ParentCommand(judged)
            return judged
        if failure is not None:
            raise failure
        return result

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Ends the agent behind what was blocked, asks a person, and judges messages that have come since it began."""
        if (decided := self._decided(state)) is not None:
            return decided
        asked = self._asked_of_input(state, is_start=False)
        return self._later(state, asked, check_many(self.guard, [part.content for part in asked]))

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Like `before_model`, without blocking the event loop."""
        if (decided := self._decided(state)) is not None:
            return decided
        asked = self._asked_of_input(state, is_start=False)
        return self._later(state, asked, await acheck_many(self.guard, [part.content for part in asked]))

    @hook_config(can_jump_to=["end"])
    def after_agent(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Asks a person about what is still held, such as the result of a tool that ends the agent."""
        return self._decided(state) if state.get("rsafe_held") else None

    @hook_config(can_jump_to=["end"])
    async def aafter_agent(self, state: RSafeState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `after_agent`."""
        return self.after_agent(state, runtime)

    def _later(
        self, state: RSafeState, asked: Sequence[Part], verdicts: Sequence[Verdict]
    ) -> dict[str, Any] | None:
        if not asked:
            return None
        update = self._after_input(state, asked, verdicts)
        decided = self._decided({**state, **update}) if "messages" in update else None  # type: ignore[typeddict-item]
        if decided is None:
            return update
        return {
            **update,
            **decided,
            "messages": [*update["messages"], *decided.get("messages", ())],
            "rsafe_seen": {**update.get("rsafe_seen", {}), **decided.get("rsafe_seen", {})},
        }

    def _decided(self, state: RSafeState) -> dict[str, Any] | None:
        """What a person or the exit behavior makes of what was blocked before; None where nothing was.

        The guard is not asked here: after an interrupt this runs again.
        """
        if error := (state.get("rsafe_error") or {}).get(self.name):
            violation = _Violation(error["stage"], Verdict.model_validate(error["verdict"]))
            if self.exit_behavior == "error":
                raise RSafeViolationError(violation.stage, violation.verdict)
            return {"messages": [self._refusal(violation)], "jump_to": "end"}
        if held := state.get("rsafe_held"):
            return self._asked_for(held)
        if self.exit_behavior != "end":
            return None
        blocked = next(filter(self._is_mine, self._results_of_turn(state)), None)
        if blocked is None:
            return None
        refusal = AIMessage(self.violation_message, response_metadata={MARK: blocked.response_metadata[MARK]})
        return {"messages": [refusal], "jump_to": "end"}

    def _results_of_turn(self, state: RSafeState) -> Iterator[BaseMessage]:
        """What tools have brought since the model's last answer, or since the prompt of this run."""
        seen = state.get("rsafe_seen") or {}

        def is_brought(message: BaseMessage) -> bool:
            if isinstance(message, AIMessage):
                # A tool may bring a message of the model, too, in whose place one of ours stands then.
                return _IN_PLACE in message.response_metadata.get(MARK, {})
            # A prompt that has been judged came before the run.
            return not (is_prompt(message) and seen.get(self._key(message)) == _digest(message))

        return takewhile(is_brought, reversed(state["messages"]))

    def _asked_for(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """What becomes of what was held; a person is asked for each, in the same order at each resumption."""
        messages: list[Any] = []
        refused: list[Mapping[str, Any]] = []
        # Who held what a person lets pass doesn't judge it again before the model's next call.
        seen: dict[str, Any] = {}
        for key, one in held.items():
            if _is_approved(interrupt(one["question"])):
                messages += one["messages"]
                holder = key.rpartition("/")[0]
                seen |= {f"{holder}/{old.id}": _digest(old) for old in one["messages"] if is_prompt(old)}
                continue
            refused.append(one)
        if not refused:
            return {"messages": messages, "rsafe_held": None, "rsafe_seen": seen}
        question = refused[0]["question"]
        violation = _Violation(question["stage"], Verdict.model_validate(question["verdict"]))
        messages.append(self._refusal(violation))
        return {"messages": messages, "rsafe_held": None, "rsafe_seen": seen, "jump_to": "end"}

    # What stands in the place of what was blocked.

    def _report(self, stage: ContentKind, verdict: Verdict) -> _Violation:
        violation = _Violation(stage, verdict)
        self._tell(violation)
        if self.exit_behavior == "error":
            raise RSafeViolationError(stage, verdict)
        return violation

    def _tell(self, violation: _Violation) -> None:
        if self.on_violation is not None:
            self.on_violation(violation.stage, violation.verdict)

    def _mark(self, violation: _Violation) -> dict[str, Any]:
        return {**mark_of(violation.stage, violation.verdict), "by": self.name}

    def _refusal(self, violation: _Violation, identifier: str | None = None) -> AIMessage:
        return AIMessage(
            self.violation_message, id=identifier, response_metadata={MARK: self._mark(violation)}
        )

    def _in_place_of(self, message: BaseMessage, violation: _Violation) -> BaseMessage:
        mark = self._mark(violation)
        if isinstance(message, ToolMessage):
            return self._result(message.name, message.tool_call_id, mark, message.id)
        if isinstance(message, AIMessage):
            ids = [call["id"] for call in message.tool_calls]
            return _without_arguments(message, ids, self.violation_message, {**mark, _IN_PLACE: True})
        return HumanMessage(self.violation_message, id=message.id, response_metadata={MARK: mark})

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


@contextlib.contextmanager
def _quiet(request: ModelRequest[Any]) -> Iterator[ModelRequest[Any]]:
    """The same request to a model whose tokens nobody sees as they come.

    What is asked is a copy. What it notes on itself, such as how often it was asked, is noted on the model in the end.
    """
    model = request.model
    if not isinstance(model, BaseChatModel):
        raise SettingsError(
            f"RSafeMiddleware can keep the tokens of a chat model out of streams, not those of a "
            f"{type(model).__name__}: give the agent a chat model, without configurable fields."
        )
    before = dict(vars(model))
    asked = model.model_copy(update={"tags": [*(model.tags or ()), _NO_STREAM]})
    # Its private attributes are the model's own.
    object.__setattr__(asked, "__pydantic_private__", model.__pydantic_private__)
    try:
        yield request.override(model=asked)
    finally:
        for name, value in vars(asked).items():
            old = before.get(name)
            # Not where somebody else has noted something in the meantime.
            if name != "tags" and value is not old and vars(model).get(name) is old:
                vars(model)[name] = value


def _quiet_config() -> RunnableConfig:
    """The same for models that this one asks: a tag of its own isn't handed on to them."""
    config = ensure_config()
    return {**config, "tags": [*(config.get("tags") or ()), _NO_STREAM]}


def _structured_answers(request: ModelRequest[Any]) -> Callable[[str], bool]:
    """Whether a tool of that name stands for a structured answer; whatever else is called may run."""
    wanted = request.response_format
    if wanted is None or isinstance(wanted, ProviderStrategy):
        return lambda name: False
    schema: Any = getattr(wanted, "schema", wanted)
    strategy = wanted if isinstance(wanted, ToolStrategy) else ToolStrategy(schema)
    names = {spec.name for spec in strategy.schema_specs}
    tools = {tool.get("name") if isinstance(tool, dict) else tool.name for tool in request.tools}
    # A schema without a title gets a name by chance, another one each time that it is made to a tool.
    by_chance = any(map(_NAMED_BY_CHANCE.fullmatch, names))
    return lambda name: (
        name in names or bool(by_chance and name not in tools and _NAMED_BY_CHANCE.fullmatch(name))
    )


def _replies(response: ModelResponse[Any] | None, failure: _Misshapen | None) -> list[AIMessage]:
    """The model's own messages; also of an answer that didn't have the wanted structure, which the error quotes."""
    if response is not None:
        return [message for message in response.result if isinstance(message, AIMessage)]
    return [failure.ai_message] if failure is not None else []


def _without_arguments(
    message: AIMessage, ids: Sequence[str | None], text: str, mark: Mapping[str, Any]
) -> AIMessage:
    """A message of the model with nothing but names in the place of blocked calls, and this text for its content."""
    calls = [{**call, "args": {}} if call["id"] in ids else call for call in message.tool_calls]
    before = message.response_metadata.get(MARK, {}).get("blocked_calls", ())
    metadata = {MARK: {**mark, "blocked_calls": [*before, *ids]}}
    return AIMessage(text, id=message.id, name=message.name, tool_calls=calls, response_metadata=metadata)


def _question(violation: _Violation, content: str) -> dict[str, Any]:
    """What a person is asked."""
    verdict = violation.verdict.model_dump(mode="json", exclude={"usage"})
    return {"stage": violation.stage, "content": content, "verdict": verdict}


def _is_approved(decision: Any) -> bool:
    return (decision.get("type") if isinstance(decision, Mapping) else decision) == "approve"


def _is_marked(message: BaseMessage) -> bool:
    return MARK in message.response_metadata


def _digest(message: BaseMessage) -> str:
    said = repr((message.content, message.additional_kwargs, message.name))
    return blake2b(said.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _messages(state: Any) -> list[AnyMessage]:
    messages = state.get("messages", ()) if isinstance(state, Mapping) else getattr(state, "messages", ())
    return list(messages)


def _failed(request: ToolCallRequest, error: Exception) -> ToolMessage:
    """What a tool raised, as its result."""
    call = request.tool_call
    return ToolMessage(str(error), name=call["name"], tool_call_id=str(call["id"]), status="error")


def _normalized(result: Any) -> Any:
    """A tool's result with messages as objects, wherever it has them."""
    if isinstance(result, list):
        return [_normalized(one) for one in result]
    if not isinstance(result, Command) or result.update is None:
        return result
    if not isinstance(result.update, Mapping):
        raise TypeError(
            "RSafeMiddleware judges the messages in a tool's Command, whose update must be a mapping, "
            f"not {type(result.update).__name__}."
        )
    messages = result.update.get("messages")
    if messages is None:
        return result
    given = messages if isinstance(messages, list | tuple) else [messages]
    return replace(result, update={**result.update, "messages": convert_to_messages(given)})


def _brought(result: Any) -> list[BaseMessage]:
    """The messages in a tool's result, whatever their type."""
    if isinstance(result, list):
        return [message for one in result for message in _brought(one)]
    messages = (result.update or {}).get("messages", ()) if isinstance(result, Command) else [result]
    return [message for message in messages if not isinstance(message, RemoveMessage)]


def _put(result: Any, refused: Mapping[int, BaseMessage], held: Mapping[str, Any]) -> Any:
    """The result with refusals in their places, and with what a person is to be asked about."""
    if isinstance(result, list):
        return [_put(one, refused, held if number == 0 else {}) for number, one in enumerate(result)]
    if isinstance(result, ToolMessage):
        message = refused.get(id(result), result)
        return Command(update={"messages": [message], "rsafe_held": held}) if held else message
    update = dict(result.update or {})
    update["messages"] = [refused.get(id(message), message) for message in update.get("messages", ())]
    return replace(result, update={**update, "rsafe_held": held} if held else update)
