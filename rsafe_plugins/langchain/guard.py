"""A guard for LangChain chains."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict

from rsafe_plugins.errors import SettingsError, UnreadableContent
from rsafe_plugins.guard import Content, Guard, GuardSettings, Verdict
from rsafe_plugins.guard.streams import Windows, aand_end, and_end, check_window
from rsafe_plugins.guard.texts import Part, acheck_many, check_many, worst
from rsafe_plugins.guard.violation import REFUSAL, RSafeViolationError
from rsafe_plugins.langchain.content import length, refusal, to_parts, whole
from rsafe_plugins.policy import ContentKind

ExitBehavior = Literal["error", "replace", "annotate"]

_RUN_TYPE = "guard"  # in traces


class RSafeGuard(RunnableSerializable[Any, Any]):
    r"""A Runnable that hands its input on unchanged when the guard finds it safe.

    It takes a str, a message, a list of messages, a `PromptValue` or a `Document`, or a mapping that holds
    one of them under `input_key`. Of messages all from the last human one on are judged, with all their text
    and tool calls, and the earlier ones are the conversation they stand in; the worst verdict decides. System
    messages are not judged. A message with an image, a sound or a file that isn't text can't be judged: that is
    a failed check, and the guard's `on_error` decides.

    `batch` and `abatch` judge all inputs as one engine batch. A stream is held until all of it is judged, or, with
    `stream_window`, until all that it said so far is.

    Args:
        guard: A `Guard`, or the settings to make one; None for `Guard()`.
        exit_behavior: What happens to a blocked input. `error` (the default) raises `RSafeViolationError`.
            `replace` hands on the refusal in the input's shape: a str for a str, a message of the same type
            and id without tool calls for each blocked message. `annotate` blocks nothing and makes of every input
            `{"input": the input, "verdict": its Verdict}`.
        kind: What a plain str is: `prompt` (the default), `response`, `document`, `tool_call` or
            `tool_result`. Messages and documents say themselves what they are.
        input_key: Where the input is a mapping, the key of what is judged.
        violation_message: The refusal's text.
        stream_window: Characters of a stream after which all that was said so far is judged and handed on. Each
            window costs a check; what a later one blocks, the reader has partly seen. None holds the whole stream.
        name: The Runnable's name in traces and graphs; None for `RSafeGuard`.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.

    Example:
        >>> from rsafe_plugins.testing import ScriptedBackend
        >>> guard = RSafeGuard({"backend": ScriptedBackend(r"\boxed{safe}")})
        >>> guard.batch(["How do I bake bread?", "And rolls?"])
        ['How do I bake bread?', 'And rolls?']
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    guard: Guard
    exit_behavior: ExitBehavior
    kind: ContentKind
    input_key: str | None
    violation_message: str
    stream_window: int | None

    def __init__(
        self,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        *,
        exit_behavior: ExitBehavior = "error",
        kind: ContentKind = "prompt",
        input_key: str | None = None,
        violation_message: str = REFUSAL,
        stream_window: int | None = None,
        name: str | None = None,
    ) -> None:
        for argument, value, choices in (
            ("exit_behavior", exit_behavior, get_args(ExitBehavior)),
            ("kind", kind, get_args(ContentKind)),
        ):
            if value not in choices:
                raise SettingsError(f"{argument} must be one of {', '.join(choices)}, not {value!r}.")
        check_window(stream_window)
        if stream_window is not None and exit_behavior == "annotate":
            raise SettingsError(
                "stream_window can't go with exit_behavior='annotate', which makes one output of a stream."
            )
        super().__init__(
            guard=Guard.of(guard),
            exit_behavior=exit_behavior,
            kind=kind,
            input_key=input_key,
            violation_message=violation_message,
            stream_window=stream_window,
            name=name,
        )

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Judges one input.

        Raises:
            RSafeViolationError: It was blocked and `exit_behavior` is `error`.
            RSafeError: The check failed and the guard's `on_error` is `raise`.
            TypeError: It is nothing that can be judged.
            ValueError: There is no message to judge.
        """
        return self._call_with_config(
            lambda value: _passed(self._judge([value]))[0], input, config, run_type=_RUN_TYPE
        )

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Like `invoke`, without blocking the event loop."""

        async def judge(value: Any) -> Any:
            return _passed(await self._ajudge([value]))[0]

        return await self._acall_with_config(judge, input, config, run_type=_RUN_TYPE)

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Judges all inputs as one engine batch; each has its own output or exception, in order.

        `max_concurrency` doesn't split the batch: the engine has its own limit. Where the guard's
        `on_error` is `raise`, one failed check is the exception of every input of the batch.
        """
        outputs = self._batch_with_config(
            self._judge, inputs, config, return_exceptions=return_exceptions, run_type=_RUN_TYPE
        )
        return _uninterrupted(outputs)

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Like `batch`, without blocking the event loop."""
        outputs = await self._abatch_with_config(
            self._ajudge, inputs, config, return_exceptions=return_exceptions, run_type=_RUN_TYPE
        )
        return _uninterrupted(outputs)

    def batch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """`batch`, with each output's index: all are completed at once."""
        yield from enumerate(self.batch(list(inputs), _listed(config), return_exceptions=return_exceptions))

    async def abatch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """`abatch`, with each output's index: all are completed at once."""
        outputs = await self.abatch(list(inputs), _listed(config), return_exceptions=return_exceptions)
        for indexed in enumerate(outputs):
            yield indexed

    def transform(
        self, input: Iterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Holds a stream until it is judged, whole or window by window, then hands on the same chunks."""

        def gate(chunks: Iterator[Any]) -> Iterator[Any]:
            stream = self._windows()
            for chunk in and_end(chunks):
                if stream.add(chunk):
                    together = stream.together()
                    released = _released(stream, together, self._judge([together]))
                    yield from released
                    if stream.has_more:
                        return

        yield from self._transform_stream_with_config(input, gate, config, run_type=_RUN_TYPE)

    async def atransform(
        self, input: AsyncIterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Like `transform`, without blocking the event loop."""

        async def gate(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
            stream = self._windows()
            async for chunk in aand_end(chunks):
                if stream.add(chunk):
                    together = stream.together()
                    for released in _released(stream, together, await self._ajudge([together])):
                        yield released
                    if stream.has_more:
                        return

        async for chunk in self._atransform_stream_with_config(input, gate, config, run_type=_RUN_TYPE):
            yield chunk

    def _windows(self) -> Windows[Any]:
        return Windows(
            self.stream_window,
            lambda chunk: length(chunk, self.input_key),
            lambda chunks: whole(chunks, self.input_key),
        )

    def _judge(self, values: list[Any]) -> list[Any]:
        """For each value what is handed on, or the exception that it ends with."""
        asked = self._parts(values)
        return self._outcomes(values, asked, check_many(self.guard, _contents(asked)))

    async def _ajudge(self, values: list[Any]) -> list[Any]:
        asked = self._parts(values)
        return self._outcomes(values, asked, await acheck_many(self.guard, _contents(asked)))

    def _parts(self, values: Sequence[Any]) -> list[list[Part] | Exception]:
        asked: list[list[Part] | Exception] = []
        for value in values:
            try:
                asked.append(to_parts(self._judged_part(value), self.kind, self.guard.policy))
            except (TypeError, ValueError) as error:
                asked.append(error)
        return asked

    def _judged_part(self, value: Any) -> Any:
        if self.input_key is None:
            return value
        if not isinstance(value, Mapping) or self.input_key not in value:
            raise TypeError(
                f"RSafeGuard expected a mapping with the key {self.input_key!r}; "
                f"the {type(value).__name__} it got has none."
            )
        return value[self.input_key]

    def _outcomes(
        self, values: Sequence[Any], asked: Sequence[list[Part] | Exception], verdicts: Sequence[Verdict]
    ) -> list[Any]:
        remaining = iter(verdicts)
        return [
            parts
            if isinstance(parts, Exception)
            else self._outcome(value, parts, list(islice(remaining, len(parts))))
            for value, parts in zip(values, asked, strict=True)
        ]

    def _outcome(self, value: Any, parts: Sequence[Part], verdicts: Sequence[Verdict]) -> Any:
        decides = worst(verdicts)
        verdict = verdicts[decides]
        if self.exit_behavior == "annotate":
            return {"input": value, "verdict": verdict}
        if not verdict.blocked:
            return value
        if self.exit_behavior == "error":
            return RSafeViolationError(parts[decides].kind, verdict)
        blocked = [
            index
            for part, verdict in zip(parts, verdicts, strict=True)
            if verdict.blocked
            for index in part.messages
        ]
        refused = refusal(self._judged_part(value), self.violation_message, blocked)
        return refused if self.input_key is None else {**value, self.input_key: refused}


def _contents(asked: Sequence[list[Part] | Exception]) -> list[Content | UnreadableContent]:
    return [part.content for parts in asked if isinstance(parts, list) for part in parts]


def _passed(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _uninterrupted(outputs: list[Any]) -> list[Any]:
    """Asked to return exceptions, LangChain returns a cancellation or an interrupt among them."""
    for output in outputs:
        if isinstance(output, BaseException) and not isinstance(output, Exception):
            raise output
    return outputs


def _released(stream: Windows[Any], together: Any, outcomes: list[Any]) -> list[Any]:
    """The chunks that waited, as they came, where nothing was to be changed; else the change, while they wait on."""
    (outcome,) = _passed(outcomes)
    return stream.release() if outcome is together else [outcome]


def _listed(
    config: RunnableConfig | Sequence[RunnableConfig] | None,
) -> RunnableConfig | list[RunnableConfig] | None:
    return list(config) if isinstance(config, Sequence) else config
