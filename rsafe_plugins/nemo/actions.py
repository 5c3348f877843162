"""What the rails execute: NeMo's messages, chunks and tool calls in, its `RailOutcome` out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby
from typing import Any, Literal

from cachetools import TTLCache
from nemoguardrails import RailsConfig
from nemoguardrails.actions import action
from nemoguardrails.actions.actions import ActionResult
from nemoguardrails.actions.rail_outcome import RailOutcome
from nemoguardrails.context import llm_response_metadata_var, raw_llm_request

from rsafe_plugins.errors import RSafeError, UnreadableContent
from rsafe_plugins.guard import Content, Guard, Verdict
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.texts import Said, acheck_many, contents_of, parts, text_of, turn_of, worst
from rsafe_plugins.nemo.chunks import Chunks
from rsafe_plugins.nemo.guards import Rail, RailGuards, policies_in
from rsafe_plugins.nemo.refusal import REFUSE, is_refusal, refusal_of
from rsafe_plugins.policy import ContentKind, Policy

log = logging.getLogger(__name__)

_NO_VERDICT = "The guard gave no verdict."
# NeMo hands the refusal of a rail to the output rails.
_OWN_REFUSAL = RailOutcome.allow(reason="the app's own refusal")
_JUST_NOW = 60.0  # seconds between two of NeMo's steps in one turn, at most
# What a passthrough model is sent, by the role of the client's message, NeMo's other names for roles included. What
# isn't named here counts as the user's.
_KINDS: Mapping[str, ContentKind | None] = {
    "assistant": "response",
    "bot": "response",
    "tool": "tool_result",
    "system": None,
    "developer": None,
    "context": None,
    "event": None,
}
_TURN_BEGINS = ("UtteranceUserActionFinished", "UserToolMessages", "Listen")

Judged = Content | UnreadableContent
"""What a check is asked of, or why it can't be."""


class RailActions:
    """The actions of the rails, with one engine behind all of them.

    They are system actions: NeMo pastes what other actions return into the main model's prompt. An exception
    that leaves them becomes NeMo's own "internal error" and blocks.

    In all of them `policy` is the policy that the flow was given (`$policy=NAME`), and `config` the rail config.

    Args:
        guards: The guard of each rail; or one guard for all of them.
    """

    def __init__(self, guards: RailGuards | Guard) -> None:
        self.guards = RailGuards(guards) if isinstance(guards, Guard) else guards
        self._passed: TTLCache[bytes, Verdict] = TTLCache(maxsize=4096, ttl=_JUST_NOW)

    @property
    def guard(self) -> Guard:
        """The guard of the rails that have none of their own."""
        return self.guards.default

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_input(
        self,
        text: object,
        policy: object = None,
        events: Sequence[Mapping[str, Any]] = (),
        config: RailsConfig | None = None,
        **_: Any,
    ) -> RailOutcome | ActionResult:
        """Judges what the user wrote since the model's last turn, in the conversation it stands in.

        Args:
            text: The message: a string, or a list of content parts. One that isn't all text is a failed check.
            policy: See the class.
            events: NeMo's events so far.
            config: See the class.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        shown = _shown(events, config)
        outcome = await self._judge("input", policy, config, [*shown, Said("prompt", text_of(text))])
        if not outcome.is_blocked and config is not None:
            outcome = await self._blocked_result(shown, config) or outcome
        return _stopping(outcome, "input", config)

    async def _blocked_result(self, shown: Sequence[Said], config: RailsConfig) -> RailOutcome | None:
        """The outcome for the tools' results since the last answer, if it blocks.

        NeMo runs the rail of tools' results only where the client's messages end with one.
        """
        results = _results_since_answer(shown)
        for policy in policies_in(config, "tool_result") if results else ():
            outcome = await self._worst(self.guards.of("tool_result", policy, config), results)
            if outcome.is_blocked:
                return outcome
        return None

    async def check_prompt(
        self, text: object, policy: object, events: Sequence[Mapping[str, Any]], config: RailsConfig | None
    ) -> RailOutcome:
        """Judges what the user wrote since the model's last turn.

        Args:
            text: The message.
            policy: See the class.
            events: What came before it, as NeMo's events.
            config: See the class.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        said = [*_said(events, config), Said("prompt", text_of(text))]
        return await self._judge("input", policy, config, said)

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_output(
        self,
        text: object,
        prompt: object,
        policy: object = None,
        events: Sequence[Mapping[str, Any]] | None = None,
        config: RailsConfig | None = None,
        context: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> RailOutcome | ActionResult:
        """Judges what the model answered, and what the user wrote where NeMo has run no input rail on it.

        NeMo shows a model's reasoning to no rail, and hands it to the client beside the answer and beside a refusal.
        So it is judged here as well, and taken out unless both it and the answer pass.

        Args:
            text: The answer, or the part of it that is about to be streamed.
            prompt: What it answers; it counts where there are no events.
            policy: See the class.
            events: NeMo's events so far; None while an answer streams.
            config: See the class.
            context: NeMo's variables.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        if events is None:
            return await self.check_answer(text, prompt, policy, (), config)
        thoughts, may_show = _thoughts(events), False
        try:
            outcome, may_show = await self._check_output(text, thoughts, policy, events, config, context)
        finally:  # also where this rail is cancelled, because one beside it has blocked
            if not may_show:
                _take_out(thoughts)
        result = _stopping(outcome, "output", config)
        if not outcome.is_blocked:
            return result
        _take_out_metadata()
        return _without_own_output(result, context)

    async def _check_output(
        self,
        text: object,
        thoughts: Sequence[Mapping[str, Any]],
        policy: object,
        events: Sequence[Mapping[str, Any]],
        config: RailsConfig | None,
        context: Mapping[str, Any] | None,
    ) -> tuple[RailOutcome, bool]:
        """The outcome for an answer, and whether the reasoning behind it may be seen."""
        if is_refusal(text, config):
            return _OWN_REFUSAL, False
        # In Colang 2 a conversation has no messages that went past its flows.
        has_passed = _is_colang_2(config) or _last_prompt_has_passed(events)
        is_seen = has_passed or not _input_rail_is_on(config, context)
        guard = self.guards.of("output", policy, config)
        shown = _shown(events, config)
        answer = _asked(guard, [*shown, Said("response", text_of(text))], only_last=is_seen)
        said = (Said("response", text_of(thought["content"])) for thought in thoughts)
        reasoning = [content for one in said for content in _asked(guard, [*shown, one], only_last=True)]
        verdicts = await acheck_many(guard, [*answer, *reasoning])
        outcome = _outcome(guard, answer, verdicts[: len(answer)])
        if not outcome.is_blocked and not has_passed and config is not None:
            outcome = await self._blocked_result(shown, config) or outcome
        return outcome, not outcome.is_blocked and not any(one.blocked for one in verdicts[len(answer) :])

    async def check_answer(
        self,
        text: object,
        prompt: object,
        policy: object,
        events: Sequence[Mapping[str, Any]],
        config: RailsConfig | None,
    ) -> RailOutcome:
        """Judges what the model answered to a prompt that an input rail has seen, or was not to see.

        Args:
            text: The answer, or the part of it that is about to be streamed.
            prompt: What it answers.
            policy: See the class.
            events: What came before the prompt, as NeMo's events.
            config: See the class.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        if is_refusal(text, config):
            return _OWN_REFUSAL
        said = [*_said(events, config), Said("prompt", text_of(prompt)), Said("response", text_of(text))]
        return await self._judge("output", policy, config, said, only_last=True)

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_retrieval(
        self,
        text: object,
        separate: object = None,
        query: object = "",
        policy: object = None,
        config: RailsConfig | None = None,
        **_: Any,
    ) -> ActionResult:
        """Judges the chunks that were retrieved, and takes out those that are blocked.

        Args:
            text: The chunks as the main model gets them.
            separate: Each of them. What of the text is in none of them is judged as well.
            query: What they were retrieved for.
            policy: See the class.
            config: See the class.

        Returns:
            The outcome; it never blocks. NeMo's variables hold the chunks that are left.

        Raises:
            RSafeError: A check failed and `on_error` is `raise`; not in Colang 2, where all chunks are taken out.
        """
        if text is None and _is_colang_2(config):
            log.warning(
                "No chunks to judge: the flow that has them must say `global $relevant_chunks` before it sets them."
            )
        chunks = Chunks.of(text, separate)
        try:
            guard = self.guards.of("retrieval", policy, config)
            verdicts = await self._of_chunks(guard, chunks.judged, query)
        except Exception as error:
            if not _is_colang_2(config):
                raise
            # There a flow goes on after an action that raises, with all the chunks.
            log.warning("No verdict on a document: %s", _said_of(error))
            none = chunks.without(set(range(len(chunks.judged))))
            return ActionResult(RailOutcome.failure(reason=_NO_VERDICT), context_updates=none.variables())
        outcomes = [rail_outcome(verdict, guard.policy) for verdict in verdicts]
        for one in outcomes:
            _trace("document", one)
        kept = chunks.without({number for number, verdict in enumerate(verdicts) if verdict.blocked})
        outcome = RailOutcome.allow(
            reason=f"{sum(verdict.blocked for verdict in verdicts)} of {len(verdicts)} chunks removed",
            metadata={"chunks": [dict(one.metadata) for one in outcomes]},
        )
        return ActionResult(outcome, context_updates=kept.variables())

    async def passed_chunks(self, texts: Sequence[str], query: str) -> list[bool]:
        """For each chunk of a knowledge base whether the main model may see it.

        Raises:
            RSafeError: A check failed and `on_error` is `raise`.
        """
        verdicts = await self._of_chunks(self.guards.of("retrieval"), texts, query)
        return [not verdict.blocked for verdict in verdicts]

    async def _of_chunks(self, guard: Guard, texts: Sequence[str], query: object) -> list[Verdict]:
        """A verdict for each chunk. One that has just passed keeps its verdict: NeMo hands it to two of us."""
        asked = [Content.document(text, text_of(query).text) for text in texts]
        keys = [
            blake2b(repr((guard.policy.digest, one)).encode("utf-8", "replace")).digest() for one in asked
        ]
        known = [self._passed.get(key) for key in keys]
        fresh = iter(await guard.acheck_many(one for one, v in zip(asked, known, strict=True) if v is None))
        verdicts = [verdict or next(fresh) for verdict in known]
        for key, verdict in zip(keys, verdicts, strict=True):
            _log_failure("document", verdict)
            if verdict.label == "safe":
                self._passed[key] = verdict
        return verdicts

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_tool_call(
        self,
        tool_calls: object,
        policy: object = None,
        events: Sequence[Mapping[str, Any]] = (),
        config: RailsConfig | None = None,
        **_: Any,
    ) -> RailOutcome:
        """Judges the tool calls of one turn as one batch; the worst decides.

        Nothing is raised, also where `on_error` is `raise`: NeMo would answer with its "internal error", and hand
        the calls to the client beside it. Where they are blocked, the reasoning behind them is taken out.

        Args:
            tool_calls: What the model asked for; each with a name and arguments, as OpenAI or LangChain has them.
            policy: See the class.
            events: NeMo's events so far.
            config: See the class.
        """
        try:
            guard = self.guards.of("tool_call", policy, config)
            history = _turns(_shown(events, config))
            calls = tool_calls if isinstance(tool_calls, list | tuple) else [tool_calls]
            contents = [replace(Content.tool_call(*_named_call(call)), history=history) for call in calls]
            outcome = await self._worst(guard, contents)
        except Exception as error:
            log.warning("No verdict on a tool_call: %s", _said_of(error))
            outcome = RailOutcome.failure(reason=_NO_VERDICT)
        if outcome.is_blocked:
            _take_out(_thoughts(events))
            _take_out_metadata()
        return outcome

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_tool_result(
        self,
        results: object,
        index: int = 0,
        policy: object = None,
        events: Sequence[Mapping[str, Any]] = (),
        config: RailsConfig | None = None,
        **_: Any,
    ) -> RailOutcome:
        """Judges the tools' results of one turn as one batch; the worst decides.

        Args:
            results: Mappings with `content` and `name`.
            index: Which of them NeMo is at: it runs the rail for each, and the first run judges them all.
            policy: See the class.
            events: NeMo's events so far.
            config: See the class.

        Raises:
            RSafeError: A check failed and `on_error` is `raise`.
        """
        if index > 0:
            return RailOutcome.allow(reason="judged with the first result")
        history = _turns(_said(events, config))
        judged: list[Judged] = []
        for result in results if isinstance(results, list | tuple) else [results]:
            known = result if isinstance(result, Mapping) else {"content": result}
            said = text_of(known.get("content"))
            judged += contents_of(said, "tool_result", str(known.get("name") or ""), history)
        return await self._worst(self.guards.of("tool_result", policy, config), judged)

    async def _judge(
        self,
        rail: Rail,
        policy: object,
        config: RailsConfig | None,
        conversation: Sequence[Said],
        *,
        only_last: bool = False,
    ) -> RailOutcome:
        guard = self.guards.of(rail, policy, config)
        return await self._worst(guard, _asked(guard, conversation, only_last=only_last))

    async def _worst(self, guard: Guard, contents: Sequence[Judged]) -> RailOutcome:
        if not contents:
            return RailOutcome.allow(reason="nothing to judge")
        return _outcome(guard, contents, await acheck_many(guard, contents))


def _asked(guard: Guard, conversation: Sequence[Said], *, only_last: bool) -> list[Judged]:
    """What of a conversation is judged."""
    # NeMo has some messages in two events.
    asked = parts([said for said, _ in groupby(conversation)], guard.policy)
    if only_last:
        asked = [part for part in asked if part.messages == asked[-1].messages]
    return [part.content for part in asked]


def _outcome(guard: Guard, contents: Sequence[Judged], verdicts: Sequence[Verdict]) -> RailOutcome:
    """The outcome of the worst of several verdicts."""
    decides = worst(verdicts)
    content = contents[decides]
    kind = content.kind if isinstance(content, Content) else "message"
    _log_failure(kind, verdicts[decides])
    outcome = rail_outcome(verdicts[decides], guard.policy)
    _trace(kind, outcome)
    return outcome


def _trace(kind: str, outcome: RailOutcome) -> None:
    """Adds the verdict to the caller's OpenTelemetry span as an event, where there is one; without content."""
    try:
        from opentelemetry import trace
    except ImportError:
        return
    known = {name: value for name, value in outcome.metadata.items() if value is not None}
    known["categories"] = [category["id"] for category in outcome.metadata["categories"]]
    attributes = {f"rsafe.{name}": value for name, value in known.items()}
    trace.get_current_span().add_event(
        "rsafe.verdict", {"rsafe.kind": kind, "rsafe.blocked": outcome.is_blocked, **attributes}
    )


def _said_of(error: Exception) -> object:
    """What may be logged of it: an error that isn't ours may quote content."""
    return error if isinstance(error, RSafeError) else type(error).__name__


def _log_failure(kind: str, verdict: Verdict) -> None:
    if verdict.error is not None:
        # The outcome can be read by the client, who has no business with what broke.
        log.warning("No verdict on a %s: %s", kind, verdict.error)


def _turns(said: Sequence[Said]) -> tuple[Turn, ...]:
    return tuple(turn_of(message) for message, _ in groupby(said))


def _named_call(call: object) -> tuple[str, str]:
    """A tool call's name and arguments; of a call in another form all that it holds."""
    known = call if isinstance(call, Mapping) else vars(call) if hasattr(call, "__dict__") else {}
    function = known.get("function")
    inner = function if isinstance(function, Mapping) else known
    arguments = inner.get("arguments", inner.get("args"))
    if isinstance(name := inner.get("name"), str) and arguments is not None:
        return name, arguments if isinstance(arguments, str) else _json(arguments)
    return "unknown", _json(call)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _thoughts(events: Sequence[Any]) -> list[dict[str, Any]]:
    """The events of this turn that hold the main model's reasoning. Colang 2 has none."""
    found: list[dict[str, Any]] = []
    for event in reversed([event for event in events if isinstance(event, dict)]):
        if event["type"] in _TURN_BEGINS:
            break
        if event["type"] == "BotThinking" and event.get("content"):
            found.append(event)
    return found


def _take_out(thoughts: Sequence[dict[str, Any]]) -> None:
    """Empties them in place: NeMo hands the first of them to the client, and has no event that takes one back."""
    for thought in thoughts:
        thought["content"] = ""


def _take_out_metadata() -> None:
    """Empties in place what a chat model says beside its answer, calls too, which NeMo hands out as `llm_metadata`."""
    if metadata := llm_response_metadata_var.get():
        metadata.clear()


def _without_own_output(
    result: RailOutcome | ActionResult, context: Mapping[str, Any] | None
) -> RailOutcome | ActionResult:
    """A block that also takes out what NeMo holds of a chain's output beside the answer.

    `RunnableRails` puts the refusal into a chain's output where that is a text or a mapping, and leaves the rest of it,
    and any other output, as it came.
    """
    output = (context or {}).get("passthrough_output")
    if output is None or isinstance(output, str):
        return result
    if not isinstance(result, ActionResult):
        result = ActionResult(return_value=result)
    updates = {**(result.context_updates or {}), "passthrough_output": {} if isinstance(output, dict) else ""}
    result.context_updates = updates
    return result


def _shown(events: Sequence[Any], config: RailsConfig | None) -> list[Said]:
    """What the main model gets to see of the conversation.

    With `passthrough` those are the client's messages as they are. NeMo's events may hold less: it takes those of
    earlier turns from a cache that knows messages by their text, and has none for tools' results in the middle.
    """
    messages = raw_llm_request.get() if config is not None and config.passthrough else None
    if not isinstance(messages, list) or _is_colang_2(config):
        return _said(events, config)
    return [
        Said(kind, text_of(message.get("content") or ""), str(message.get("name") or ""))
        for message in messages
        if (kind := _KINDS.get(message.get("role") or message.get("type"), "prompt"))
    ]


def _results_since_answer(shown: Sequence[Said]) -> list[Judged]:
    """What tools have brought back since the model last said something, where other messages follow."""
    if shown and shown[-1].kind == "tool_result":
        return []
    results: list[Judged] = []
    for number, message in enumerate(shown):
        if message.kind == "response" and message.said.text.strip():
            results.clear()
        elif message.kind == "tool_result":
            results += contents_of(message.said, "tool_result", message.name, _turns(shown[:number]))
    return results


def _said(events: Sequence[Any], config: RailsConfig | None) -> list[Said]:
    """The conversation in NeMo's events."""
    keys = {"UserMessage": "text"}
    if config is not None and (config.passthrough or _is_colang_2(config)):
        # The model is then shown what a rail has blocked in an earlier turn, too.
        keys["UtteranceUserActionFinished"] = "final_transcript"
    said = []
    for event in events:
        # Colang 2 has some of its events as objects.
        known = event if isinstance(event, Mapping) else {**event.arguments, "type": event.name}
        if key := keys.get(known["type"]):
            said.append(Said("prompt", text_of(known[key])))
        elif known["type"] == "StartUtteranceBotAction":
            said.append(Said("response", text_of(known["script"])))
    return said


def _stopping(
    outcome: RailOutcome, rail: Literal["input", "output"], config: RailsConfig | None
) -> RailOutcome | ActionResult:
    """The outcome, with the refusal and the stop as events where NeMo would lose the flow's own stop.

    It does in rails that run in parallel, in a config with retrieval rails: the refusal makes it retrieve chunks, whose
    rail ends the flow that refuses, and the main model is asked as if nothing had been blocked.
    """
    if not outcome.is_blocked or config is None or _is_colang_2(config) or config.enable_rails_exceptions:
        return outcome
    if not getattr(config.rails, rail).parallel or not config.rails.retrieval.flows:
        return outcome
    said = {"type": "StartUtteranceBotAction", "script": refusal_of(config)}
    events = [{"type": "BotIntent", "intent": REFUSE}, said, {"type": "BotIntent", "intent": "stop"}]
    return ActionResult(return_value=outcome, events=events)


def _is_colang_2(config: RailsConfig | None) -> bool:
    return config is not None and config.colang_version != "1.0"


def _input_rail_is_on(config: RailsConfig | None, context: Mapping[str, Any] | None) -> bool:
    options = (context or {}).get("generation_options") or {}
    is_there = config is not None and bool(policies_in(config, "input"))
    return is_there and bool(options.get("rails", {}).get("input", True))


def _last_prompt_has_passed(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the input rail let the user's last message pass.

    NeMo runs no input rail where the client's messages don't end with the user's. A client can send events too,
    but no `RailOutcome`.
    """
    passed = last = False
    for event in _flat(events):
        match event["type"]:
            case "UtteranceUserActionFinished":
                passed = False
            case "InternalSystemActionFinished" if event.get("action_name") == "rsafe_check_input":
                outcome = event.get("return_value")
                passed = isinstance(outcome, RailOutcome) and not outcome.is_blocked
            case "UserMessage":
                passed, last = False, passed
    return last


def _flat(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The events with those of rails that ran in parallel in their place."""
    for event in events:
        yield from event["data"]["events"] if event["type"] == "EventHistoryUpdate" else (event,)


def rail_outcome(verdict: Verdict, policy: Policy) -> RailOutcome:
    """A verdict in NeMo's words. Clients may read it, so neither content nor reasoning is in it.

    Args:
        verdict: The guard's verdict.
        policy: The policy it was made under, for the categories' names.
    """
    names = {category.id: category.name for category in policy.categories}
    metadata = {
        "label": verdict.label,
        "categories": [{"id": identifier, "name": names[identifier]} for identifier in verdict.categories],
        "score": verdict.score,
        "model": verdict.model,
        "policy": verdict.policy,
        "thought": verdict.reasoning is not None,
        "latency_ms": round(verdict.latency_ms, 1),
    }
    if verdict.label is None:
        outcome = RailOutcome.failure if verdict.blocked else RailOutcome.allow
        return outcome(reason=_NO_VERDICT, metadata=metadata)
    named = ", ".join(f"{identifier} {names[identifier]}" for identifier in verdict.categories)
    outcome = RailOutcome.block if verdict.blocked else RailOutcome.allow
    return outcome(reason=f"{verdict.label}: {named}" if named else verdict.label, metadata=metadata)
