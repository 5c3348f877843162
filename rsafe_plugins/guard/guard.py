"""The guard: contents in, verdicts out, through one engine batch a step."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from rsafe_plugins.backends import Backend, Completion, Message, Request, Usage, shared_backend
from rsafe_plugins.errors import (
    BackendError,
    BackendTimeout,
    InputTooLong,
    RSafeError,
    SettingsError,
    VerdictError,
)
from rsafe_plugins.guard import loop
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.dialects import dialect_of, guessed
from rsafe_plugins.guard.fitted import OperatingPoint, operating_point, read
from rsafe_plugins.guard.flights import Flights
from rsafe_plugins.guard.joiner import Joiner
from rsafe_plugins.guard.neutralize import without_tags
from rsafe_plugins.guard.parts import MOST_CHARACTERS, MOST_PARTS, Span, halves
from rsafe_plugins.guard.settings import GuardSettings, OnError, Reasoning
from rsafe_plugins.guard.verdict import Label, Verdict, named_categories
from rsafe_plugins.policy import Category, ContentKind, Policy
from rsafe_plugins.policy.condense import condensed
from rsafe_plugins.policy.taxonomies import in_short, left_out

log = logging.getLogger(__name__)

T = TypeVar("T")

_CATEGORY_TOKENS = 32
# Below this probability of both labels together the model wasn't answering the question.
_LEAST_MASS = 0.5
# An engine that takes longer to start, fetching its weights included, counts as hung.
_START_SECONDS = 900.0
# From so many characters on a content takes milliseconds to be made a prompt.
_LARGE = 50_000
# A prompt, query or tool's name of so few characters is never too long by itself.
_SHORT = 200

# What is asked about category by category; documents weren't part of such training.
_COMPARED: tuple[ContentKind, ...] = ("prompt", "response")
# A category that is met is named beside the one that fits best if it is at least that likely to be the one of the two.
_LEAST_FIT = 0.25
_NOT_COMPARED = "What was found unsafe couldn't be compared with what the policy leaves out in time."
# Of a policy of more categories the model writes what it found.
_MOST_ASKED = 40

_FORGOTTEN = Content.prompt("")


@dataclass(slots=True)
class _Check:
    """One content on its way to a verdict."""

    content: Content
    policy: Policy
    messages: tuple[Message, ...]
    caller: int = 0
    label: Label | None = None
    score: float | None = None
    thought: str | None = None
    conclusion: str = ""
    named: tuple[str, ...] = ()
    error: RSafeError | None = None
    usage: Usage = field(default_factory=Usage)
    part: Span | None = None
    parts: list[_Check] = field(
        default_factory=list
    )  # what it is judged by: its text's parts, or its categories
    unconfirmed: bool = False
    settled: bool = False  # its verdict won't change any more

    def take_usage(self, asked: Sequence[_Check]) -> RSafeError | None:
        """Counts what questions about it took. Returns why one of them failed, if one did."""
        self.usage = sum((one.usage for one in asked), self.usage)
        return next((one.error for one in asked if one.error is not None), None)

    def forget(self) -> None:
        """Drops what was judged, so that a verdict that is kept doesn't keep it."""
        self.content, self.messages, self.parts = _FORGOTTEN, (), []

    def take_what_is_unsafe(self) -> None:
        """The verdict of the worst of its parts that are unsafe, whatever the others would have come to."""
        for part in self.parts:
            part.take_what_is_unsafe()
        if self.label is None and (unsafe := [part for part in self.parts if part.label == "unsafe"]):
            self.take_worst(unsafe)

    def take_worst(self, parts: Sequence[_Check]) -> None:
        """The verdict of the unsafe part with the highest probability; without one, of a part that failed."""

        def badness(part: _Check) -> tuple[bool, bool, float]:
            return part.label == "unsafe", part.error is not None, part.score or 0.0

        worst = max(parts, key=badness)
        self.label, self.score, self.error = worst.label, worst.score, worst.error
        self.part = worst.part or self.part
        self.thought, self.conclusion, self.named = worst.thought, worst.conclusion, worst.named
        self.unconfirmed = any(part.unconfirmed for part in parts)
        self.usage = sum((part.usage for part in parts), self.usage)


class Guard:
    r"""Judges contents against a policy.

    Every argument that is not given comes from the environment (`RSAFE_POLICY`, ...), then from `rsafe.yaml`,
    then from the defaults; `GuardSettings` says what each means.

    Args:
        policy: A `Policy`, a built-in policy's name, or a policy file's path. Default `rsafe-18`.
        backend: A backend object, or a string such as `embedded`. Default `embedded`.
        reasoning: `never`, `always` or `adaptive` (the default).
        threshold: Unsafe from this probability on, 0 to 1; or a file that `rsafe eval --fit` wrote.
        band: Lowest and highest probability at which adaptive reasoning thinks.
        category_threshold: What is found unsafe under a policy of few categories is compared with those that it leaves
            out, and is safe if one of its own fits better with less than this probability; 0 doesn't compare.
        max_reasoning_tokens: Budget of a thought, in tokens.
        timeout: Seconds for one check.
        on_error: What a failed check does: `block` (the default), `allow`, or `raise`.
        cache: Seconds for which a verdict is kept for the same content; 0, the default, keeps none.
        name_categories: Whether what is blocked without a thought is asked about once more, to name its categories.
        policy_tokens: What the policy may take of the prompt, in tokens; a longer one loses examples.
        dialect: How the guard model is asked and answers: a name such as `llama-guard`, or a dialect file. Left
            out, it is guessed from the model's name.
        template: A prompt template file.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.

    Example:
        >>> from rsafe_plugins import Guard
        >>> from rsafe_plugins.testing import ScriptedBackend
        >>> guard = Guard(backend=ScriptedBackend(r"\boxed{safe}"))
        >>> guard.check("How do I bake bread?").label
        'safe'
    """

    def __init__(
        self,
        policy: Policy | str | Path | None = None,
        *,
        backend: Backend | str | None = None,
        reasoning: Reasoning | None = None,
        threshold: float | str | Path | None = None,
        band: tuple[float, float] | None = None,
        category_threshold: float | None = None,
        max_reasoning_tokens: int | None = None,
        timeout: float | None = None,
        on_error: OnError | None = None,
        cache: float | None = None,
        name_categories: bool | None = None,
        policy_tokens: int | None = None,
        dialect: str | Path | None = None,
        template: str | Path | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._set_up(GuardSettings.read(given))

    @classmethod
    def from_settings(cls, settings: GuardSettings) -> Guard:
        """A guard with settings that were read elsewhere."""
        guard = cls.__new__(cls)
        guard._set_up(settings)
        return guard

    @classmethod
    def of(cls, guard: Guard | GuardSettings | Mapping[str, Any] | None) -> Guard:
        """The guard that an adapter's `guard=` means: a guard, the settings of one, or None for `Guard()`.

        Raises:
            SettingsError: It is something else, or a setting can't be used.
            PolicyError: The policy can't be found or read.
            TemplateError: The template can't be found or read.
        """
        if isinstance(guard, Guard):
            return guard
        if isinstance(guard, GuardSettings):
            return cls.from_settings(guard)
        if guard is None or isinstance(guard, Mapping):
            return cls.from_settings(GuardSettings.read(guard or {}, source="guard"))
        raise SettingsError(
            f"guard must be a Guard or a mapping of its settings, not {type(guard).__name__}."
        )

    def _set_up(self, settings: GuardSettings) -> None:
        self.settings = settings
        policy = settings.policy if isinstance(settings.policy, Policy) else Policy.load(settings.policy)
        self.policy = _fitting(policy, settings.policy_tokens)
        self._left_out = {kind: left_out(policy, kind) for kind in _COMPARED}
        self.backend = (
            settings.backend if isinstance(settings.backend, Backend) else shared_backend(settings.backend)
        )
        self.dialect = dialect_of(settings.dialect, settings.template, self.backend.model)
        if settings.reasoning == "always" and self.dialect.labels and self.dialect.thought is None:
            raise SettingsError(
                f"A guard of the dialect {self.dialect.name} doesn't think: set reasoning to never or adaptive."
            )
        self._flights = Flights(
            self._judge,
            settings.cache,
            lambda check: check.error is None and not check.unconfirmed,
            self._late,
        )
        self._joiner = Joiner(self._complete, max(1, self.backend.concurrency))
        _ = self.operating_point  # a file that can't be read is said now, not at the first check
        if not self.dialect.labels and (settings.threshold is not None or settings.band is not None):
            raise SettingsError(
                f"A guard of the dialect {self.dialect.name} gives no probabilities: leave threshold and band out."
            )
        if settings.category_threshold and settings.reasoning == "always":
            raise SettingsError(
                "A guard that always thinks isn't asked category by category after its verdict: leave "
                "category_threshold out."
            )
        if settings.category_threshold and self.dialect.by_category is None:
            raise SettingsError(
                f"A guard of the dialect {self.dialect.name} isn't asked category by category: leave "
                "category_threshold out."
            )

    def __deepcopy__(self, memo: object) -> Guard:
        """Itself: an engine and its locks have no copy, and settings don't change."""
        return self

    def compared_with(self, kind: ContentKind) -> tuple[Category, ...]:
        """The categories that the policy leaves out, where what is found unsafe is asked about them, too."""
        # From 0 on everything is unsafe, and nothing could be said to lie under it.
        if not self._tells_apart or not self.operating_point.threshold:
            return ()
        return self._left_out.get(kind, ())

    def names_by_category(self, kind: ContentKind) -> bool:
        """Whether what such a content is unsafe for comes from a question about each category of the policy."""
        return kind in _COMPARED and self._tells_apart

    @property
    def _tells_apart(self) -> bool:
        """Whether the model was fitted for questions about single categories, and can be asked them."""
        # A server may have said only now which model it is, and so what was fitted for it.
        fitted = bool(self.operating_point.category_threshold)
        return fitted and self.dialect.by_category is not None and self._scores

    @cached_property
    def by_category(self) -> Guard:
        """The same engine and policy, asked category by category."""
        settings = {
            "policy": self.policy,
            "backend": self.backend,
            "dialect": self.dialect.by_category,
            "template": None,
            "reasoning": "never",
            "threshold": 0.5,
            "category_threshold": None,
        }
        return Guard.from_settings(self.settings.model_copy(update=settings))

    @property
    def operating_point(self) -> OperatingPoint:
        """The threshold and the band that count: those given, else those fitted for this model and policy."""
        given = self.settings.threshold
        if isinstance(given, float):
            point = operating_point(self.backend.model, self.policy)
            low, high = point.band
            # Where thinking doesn't pay at the fitted threshold, it doesn't at another one.
            band = (low, high) if low < high else (given, given)
            point = point.model_copy(update={"threshold": given, "band": band})
        else:
            point = operating_point(self.backend.model, self.policy, given)
        own = {"band": self.settings.band, "category_threshold": self.settings.category_threshold}
        return point.model_copy(update={name: value for name, value in own.items() if value is not None})

    def check(self, content: Content | str) -> Verdict:
        """Judges one content; a str is a prompt.

        Raises:
            PolicyError: No category of the policy applies to this kind of content.
            TemplateError: The template can't be used for it.
            RSafeError: The check failed and `on_error` is `raise`.
        """
        return self.check_many([content])[0]

    def check_many(self, contents: Iterable[Content | str]) -> list[Verdict]:
        """Judges contents as one engine batch; the verdicts come in the same order.

        Raises:
            TypeError: It isn't a list of contents, or one is neither a content nor a str.
            PolicyError: No category of the policy applies to one of the kinds of content.
            TemplateError: The template can't be used for one of them.
            RSafeError: A check failed and `on_error` is `raise`.
        """
        return loop.run_blocking(self._check_many(_listed(contents), threading.get_ident()))

    async def acheck(self, content: Content | str) -> Verdict:
        """Like `check`, without blocking the caller's event loop."""
        return (await self.acheck_many([content]))[0]

    async def acheck_many(self, contents: Iterable[Content | str]) -> list[Verdict]:
        """Like `check_many`, without blocking the caller's event loop. Cancelling it cancels the engine's work."""
        return await loop.run(self._check_many(_listed(contents), id(asyncio.current_task())))

    async def _check_many(self, contents: Sequence[Content | str], caller: int) -> list[Verdict]:
        started = time.perf_counter()
        checks = [await self._begin(_content(content)) for content in contents]
        for check in checks:
            check.caller = caller
        results = await self._flights.results(
            [(_key(check.content), check) for check in checks], self._seconds(len(checks))
        )
        latency = (time.perf_counter() - started) * 1000
        return [self._verdict(check, latency, cached=cached) for check, cached in results]

    def _seconds(self, checks: int) -> float:
        """What a batch may take; as long again where what is unsafe is compared."""
        return self._verdict_seconds(checks) * (2 if any(map(self.compared_with, _COMPARED)) else 1)

    def _verdict_seconds(self, checks: int) -> float:
        """What the verdicts of a batch may take: the timeout of one check for each round of the engine."""
        each = len(self.policy.categories) if self.dialect.one_category else 1
        return self.settings.timeout * math.ceil(checks * each / self.backend.concurrency)

    async def _judge(self, checks: list[_Check]) -> list[_Check]:
        """Decides the checks, within the time that they have; a content that is too long is decided in parts."""
        failure = await self._start_engine()
        seconds = self._seconds(len(checks))
        until = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(until):
                failure = failure or await self._engine(self.backend.prepare()) or self._unfit_engine()
                if isinstance(failure, BackendError):
                    for check in checks:
                        check.error = check.error or failure
                await self._decide(checks)
                await self._decide_with_less_history(checks)
                await self._refuse_long_contexts([c for c in checks if isinstance(c.error, InputTooLong)])
                await self._decide_in_parts([c for c in checks if isinstance(c.error, InputTooLong)])
        except TimeoutError:
            for check in checks:
                check.take_what_is_unsafe()
                self._time_out(check, seconds)
            if any(check.unconfirmed for check in checks):
                log.warning(_NOT_COMPARED)
        for check in checks:
            check.settled = True
        await self._name_what_is_unsafe(checks, until)
        for check in checks:
            check.forget()
        return checks

    def _unfit_engine(self) -> BackendError | None:
        """What keeps this engine from being asked in this dialect, as is known once it is prepared."""
        if self.settings.dialect is None and self.settings.template is None:
            # A server may have said its model's name only now.
            name = guessed(self.backend.model)
            if name != self.dialect.name:
                return BackendError(
                    f"The model is {self.backend.model}, of the dialect {name}, and the guard was set up for "
                    f"{self.dialect.name}: set dialect, or name the model in the backend string."
                )
        file = self.settings.threshold
        if isinstance(file, Path) and self.backend.model not in (fitted := read(file)):
            has = ", ".join(fitted) or "none"
            return BackendError(
                f"The model is {self.backend.model}, and the thresholds in {file} are of {has}: fit them for this "
                "model with `rsafe eval --fit`, or set threshold to a number."
            )
        if self.dialect.one_category and self.dialect.own_chat and not self.backend.renders_chat:
            return BackendError(
                f"This engine can't be asked in the dialect {self.dialect.name}, whose chat template must be given "
                "each category: run the model in process, with llamacpp, transformers or vllm."
            )
        return None

    async def _start_engine(self) -> object:
        # Not counted: fetching the weights takes its own time. But a download that stands, or another process
        # that holds the cache, must not hang a check for ever.
        try:
            async with asyncio.timeout(_START_SECONDS):
                return await self._engine(self.backend.start())
        except TimeoutError:
            return BackendTimeout(f"The guard's engine didn't start within {_START_SECONDS:g} s.")

    def _time_out(self, check: _Check, seconds: float) -> None:
        if check.label is None and (check.error is None or isinstance(check.error, InputTooLong)):
            check.error = BackendTimeout(f"The guard model gave no verdict within {seconds:g} s.")

    def _late(self, check: _Check, under_way: _Check, seconds: float) -> _Check:
        """What a check comes to that waits for the same content in another caller's batch, and too long."""
        late = replace(under_way if under_way.settled else check)
        self._time_out(late, seconds)
        return late

    async def _decide_with_less_history(self, checks: Sequence[_Check]) -> None:
        """Leaves out the older half of the earlier turns, again and again, where all doesn't fit the engine.

        Otherwise a long conversation would be blocked for its length alone. What is judged stays whole.
        """
        while too_long := [c for c in checks if isinstance(c.error, InputTooLong) and c.content.history]:
            for check in too_long:
                turns = check.content.history
                check.content = replace(check.content, history=turns[(len(turns) + 1) // 2 :])
                check.thought, check.conclusion, check.named = None, "", ()
                if check.content.size <= MOST_CHARACTERS:
                    check.messages, check.error = self._messages(check.policy, check.content), None
            await self._decide(too_long)

    async def _refuse_long_contexts(self, checks: Sequence[_Check]) -> None:
        """Fails those whose context alone is too long, which in parts would be found out again for each part."""
        tried = [c for c in checks if len(c.content.context) > _SHORT and c.content.size <= MOST_CHARACTERS]
        # Not with a part of the text, which could be one that takes many tokens.
        alone = [await self._begin(replace(check.content, text="."), check.policy) for check in tried]
        await self._decide(alone)
        for check, one in zip(tried, alone, strict=True):
            check.usage += one.usage
            if isinstance(one.error, InputTooLong):
                check.error = BackendError(
                    f"What the {check.content.kind} belongs to (its prompt, query or tool) is too long for the "
                    f"engine's context, with {len(check.content.context)} characters: leave some of it out, or use "
                    "an engine with a larger context."
                )

    async def _decide_in_parts(self, checks: Sequence[_Check]) -> None:
        """Halves each content until its parts fit; the worst part decides."""
        waiting = [
            (check, span) for check in checks for span in _halves(check.content, (0, len(check.content.text)))
        ]
        done: dict[int, list[_Check]] = {id(check): [] for check, _ in waiting}
        while waiting:
            parts = [await self._part(check, span) for check, span in waiting]
            for (check, _), part in zip(waiting, parts, strict=True):
                check.parts.append(part)
            await self._decide(parts)
            following: list[tuple[_Check, Span]] = []
            for (check, span), part in zip(waiting, parts, strict=True):
                smaller = _halves(check.content, span) if isinstance(part.error, InputTooLong) else ()
                following.extend((check, half) for half in smaller)
                if not smaller:
                    done[id(check)].append(part)
            for check in checks:
                count = len(done.get(id(check), ())) + sum(one is check for one, _ in following)
                if count > MOST_PARTS:
                    check.error = InputTooLong(
                        f"The content makes more than {MOST_PARTS} parts of the engine's context: check it in "
                        "pieces, or use an engine with a larger one."
                    )
                    check.take_what_is_unsafe()
                    del done[id(check)]
            waiting = [(check, span) for check, span in following if id(check) in done]
        for check in checks:
            if id(check) in done:
                check.take_worst(done[id(check)])

    async def _part(self, check: _Check, span: Span) -> _Check:
        text = check.content.text[span[0] : span[1]]
        part = await self._begin(replace(check.content, text=text), check.policy)
        part.part = span
        return part

    async def _begin(self, content: Content, policy: Policy | None = None) -> _Check:
        policy = policy or self.policy
        if content.size > MOST_CHARACTERS:
            return _Check(
                content,
                policy,
                (),
                error=InputTooLong(
                    f"The content and what surrounds it have {content.size} characters, and a guard takes at most "
                    f"{MOST_CHARACTERS}: check it in pieces."
                ),
            )
        if content.size > _LARGE:  # the checks of others go on meanwhile
            return _Check(content, policy, await asyncio.to_thread(self._messages, policy, content))
        return _Check(content, policy, self._messages(policy, content))

    def _messages(self, policy: Policy, content: Content, *, thinking: bool = False) -> tuple[Message, ...]:
        """The chat for answers that the guard begins; one serves both ways unless the prompt itself says which."""
        thinks = thinking or self.settings.reasoning == "always" or not self.dialect.mode_in_prompt
        return self.dialect.messages(policy, content, "open" if thinks else "skip")

    @property
    def _can_begin(self) -> bool:
        """Whether the model's answer can be begun for it."""
        as_message = self.dialect.own_chat and not self.backend.renders_chat
        return self.backend.supports_prefill and not as_message

    @property
    def _scores(self) -> bool:
        # A label of several tokens is scored by beginning the answer with the first of them.
        return self.backend.supports_candidates and bool(self.dialect.labels) and self._can_begin

    async def _decide(self, checks: Sequence[_Check]) -> None:
        if not self.dialect.one_category:
            await self._decide_whole(checks)
            return
        for check in checks:
            check.parts = [await self._of_category(check.content, c) for c in _categories(check)]
        await self._decide_whole([one for check in checks for one in check.parts])
        for check in checks:
            if ones := check.parts:
                check.take_worst(ones)
                check.named = tuple(one.policy.categories[0].id for one in ones if one.label == "unsafe")
                check.parts = []

    async def _of_category(self, content: Content, category: Category) -> _Check:
        one = await self._begin(content, self.policy.model_copy(update={"categories": (category,)}))
        one.named = (category.id,)
        return one

    async def _decide_whole(self, checks: Sequence[_Check]) -> None:
        for some in self._rounds(checks):
            await self._decide_some(some)

    async def _score_exactly(self, checks: Sequence[_Check]) -> None:
        for some in self._rounds(checks):
            for check in await self._score_once(some, thought=False, exact=True):
                check.error = VerdictError("The engine gave a bound where a probability was asked for.")

    def _rounds(self, checks: Sequence[_Check]) -> Iterator[Sequence[_Check]]:
        """What goes to the engine at once."""
        size = self.backend.concurrency if self.backend.depth_first else len(checks)
        for first in range(0, len(checks), max(size, 1)):
            yield checks[first : first + size]

    async def _decide_some(self, checks: Sequence[_Check]) -> None:
        if not self._scores:
            await self._generate(checks)
            return
        uncertain = checks
        if self.settings.reasoning != "always":
            await self._score(checks)
            point = self.operating_point
            uncertain = [check for check in checks if self._is_uncertain(check, point)]
        if uncertain:
            await self._think(uncertain)
        bare = [check for check in checks if check.label == "unsafe" and check.thought is None]
        compared: list[_Check] = []
        final: list[_Check] = []
        for check in bare:
            (compared if self.compared_with(check.content.kind) else final).append(check)
        await self._compare(compared)
        await self._write_names([check for check in final if self._naming(check) == "written"])

    def _is_uncertain(self, check: _Check, point: OperatingPoint) -> bool:
        """Whether its score is one that adaptive reasoning thinks about."""
        if self.settings.reasoning != "adaptive" or self.dialect.thought is None:
            return False
        low, high = point.band
        return check.score is not None and low < high and low <= check.score <= high

    async def _score(self, checks: Sequence[_Check], *, thought: bool = False) -> None:
        """The probability of each label right after what the answer begins with.

        Bounds are enough where they settle the label; where they don't, the check is scored once more, exactly.
        """
        vague = await self._score_once(checks, thought=thought, exact=thought)
        for check in vague:
            check.label = check.score = None
        await self._score_once(vague, thought=thought, exact=True)

    async def _score_once(self, checks: Sequence[_Check], *, thought: bool, exact: bool) -> list[_Check]:
        """Scores the checks, and returns those whose label rests on no more than a bound."""
        labels = self.dialect.labels
        point = self.operating_point
        compared = {kind for kind in {check.content.kind for check in checks} if self.compared_with(kind)}
        vague: list[_Check] = []

        def request(check: _Check) -> Request:
            begin = self.dialect.begin
            if thought and (form := self.dialect.thought):
                begin = f"{form.open}{without_tags(check.thought or '')}{form.close}{form.then}"
            return self._request(
                check, prefill=begin, candidates=tuple(labels), exact=exact, thinking=thought
            )

        def read(check: _Check, completion: Completion) -> None:
            probability = {"safe": 0.0, "unsafe": 0.0}
            for spelling, label in labels.items():
                probability[label] += math.exp(completion.logprobs[spelling])
            mass = probability["safe"] + probability["unsafe"]
            # Also true where a broken engine answers with NaN.
            if not _LEAST_MASS <= mass <= 1.0 + 1e-3:
                raise VerdictError(
                    f"Expected the model to answer {_named(labels)}; it gave them together a probability of {mass:.2g}."
                )
            check.score = probability["unsafe"] / mass
            likelier: Label = "unsafe" if check.score >= point.threshold else "safe"
            # What is to be thought about is no verdict yet, also if time runs out before that.
            check.label = likelier if thought or not self._is_uncertain(check, point) else None
            check.unconfirmed = check.label == "unsafe" and not thought and check.content.kind in compared
            # What only seems as likely as that decides nothing, and never that something is safe.
            seeming = {labels[spelling] for spelling in completion.bounded}
            if "safe" in seeming or likelier in seeming:
                vague.append(check)

        await self._ask(checks, request, read)
        return vague

    def _request(self, check: _Check, *, thinking: bool = False, **asked: Any) -> Request:
        messages = check.messages
        if thinking and self.dialect.mode_in_prompt:
            messages = self._messages(check.policy, check.content, thinking=True)
        arguments = self.dialect.template_args(check.policy, check.content)
        return Request(messages=messages, template_args=arguments, **asked)

    async def _think(self, checks: Sequence[_Check]) -> None:
        """A thought within its budget, closed by us whether the model closed it or not, then the scored verdict."""
        form = self.dialect.thought
        assert form is not None
        for check in checks:
            # What was said without a thought no longer counts, also if thinking fails.
            check.label = check.score = None

        def read(check: _Check, completion: Completion) -> None:
            check.thought = completion.text.split(form.close)[0].strip()

        await self._ask(
            checks,
            lambda check: self._request(
                check,
                prefill=form.open,
                max_tokens=self.settings.max_reasoning_tokens,
                # A model that opens another thought, or begins its answer, has ended this one.
                stop=tuple(filter(None, (form.close, form.then.strip(), form.open))),
                thinking=True,
            ),
            read,
        )
        await self._score([check for check in checks if check.error is None], thought=True)

    async def _compare(self, checks: Sequence[_Check]) -> None:
        """Which category fits what is unsafe: where it is one that the policy leaves out, it is safe under this policy.

        Until that is known, and where it can't be asked in as much time as the verdict had, it stays unsafe.
        """
        asked: list[tuple[_Check, list[_Check], list[_Check]]] = []
        for check in checks:
            own = await self._questions(check.content, _categories(check))
            others = await self._questions(check.content, self.compared_with(check.content.kind))
            asked.append((check, own, others))
        try:
            async with asyncio.timeout(self._verdict_seconds(len(checks))):
                await self.by_category._score_exactly(
                    [one for _, own, others in asked for one in (*own, *others)]
                )
        except TimeoutError:
            log.warning(_NOT_COMPARED)
            return
        least = self.operating_point.category_threshold
        for check, own, others in asked:
            failed = check.take_usage((*own, *others))
            if failed is not None:
                log.warning(
                    "What was found unsafe couldn't be compared with what the policy leaves out: %s", failed
                )
                continue
            check.unconfirmed = False
            check.named = _best_fitting(own)
            best, other = max(own, key=_log_odds), max(others, key=_log_odds)
            fits = _fit(best, other)
            if other.label == "unsafe" and fits < least:
                # The score lies under its threshold by as much as the fit does.
                score = self.operating_point.threshold * fits / least
                check.label, check.score = "safe", min(check.score or 0.0, score)

    async def _questions(self, content: Content, categories: Iterable[Category]) -> list[_Check]:
        """One for each category, not asked yet."""
        asked = [await self.by_category._of_category(content, category) for category in categories]
        await asyncio.sleep(0)  # the checks of others go on in between
        return asked

    def _naming(self, check: _Check) -> Literal["", "only", "asked", "written"]:
        """How the categories of a bare unsafe verdict come to be known."""
        categories = _categories(check)
        if not self.settings.name_categories or not categories:
            return ""
        if len(categories) == 1:
            return "only"
        is_asked = self.names_by_category(check.content.kind) and len(categories) <= _MOST_ASKED
        return "asked" if is_asked else "written"

    async def _name_what_is_unsafe(self, checks: Sequence[_Check], until: float) -> None:
        """What verdicts are for that don't say it yet. It explains a block and can't lift it.

        It is asked once all verdicts are known, until their time is up by the loop's clock, but for at most half of
        what they had, and of a content in parts for its worst part alone.
        """
        asked: list[_Check] = []
        for check in checks:
            if check.label != "unsafe" or check.named:
                continue
            way = self._naming(check)
            if way == "only":
                check.named = (_categories(check)[0].id,)
            elif way == "asked" and check.thought is None and not check.unconfirmed:
                asked.append(check)
        if not asked:
            return
        half = asyncio.get_running_loop().time() + self._verdict_seconds(len(asked)) / 2
        try:
            async with asyncio.timeout_at(min(half, until)):
                for check in asked:
                    await self._name_by_category(check)
        except TimeoutError:
            log.warning("The categories of what was found unsafe couldn't be named in time.")

    async def _name_by_category(self, check: _Check) -> None:
        asked = await self._questions(_worst_part(check), map(in_short, _categories(check)))
        await self.by_category._score_exactly(asked)
        failed = check.take_usage(asked)
        if failed is None:
            check.named = _best_fitting(asked)
        else:
            log.warning("The categories of what was found unsafe couldn't be named: %s", failed)

    async def _write_names(self, checks: Sequence[_Check]) -> None:
        """What bare unsafe verdicts are for, as the model writes it after them."""
        naming = self.dialect.naming
        if naming is None or not self._can_begin:
            return

        def read(check: _Check, completion: Completion) -> None:
            check.conclusion = f"Categories:{completion.text}"

        await self._ask(
            checks,
            lambda check: self._request(check, prefill=naming, max_tokens=_CATEGORY_TOKENS, stop=("\n",)),
            read,
            explains=True,
        )

    async def _generate(self, checks: Sequence[_Check]) -> None:
        """The whole answer as text, parsed strictly: for engines that can't score.

        Where the answer of a guard that may think is no verdict, one more request asks for the bare one.
        """
        mode = self.settings.reasoning

        def read(check: _Check, completion: Completion) -> None:
            answer = self.dialect.parse(completion.text, thinking=True if mode == "always" else None)
            # Where nothing says that an answer is complete, what follows could be a part of the thought.
            whole = answer.reasoning is not None and self.dialect.enough is not None
            if completion.finish_reason == "length" and not whole:
                raise VerdictError("Expected an answer that ends; it ran into its token budget.")
            check.label, check.thought, check.conclusion = answer.label, answer.reasoning, answer.conclusion

        def generated(check: _Check, tokens: int, *, thinking: bool = False) -> Request:
            stop, enough = self.dialect.stop, self.dialect.enough
            return self._request(check, max_tokens=tokens, stop=stop, enough=enough, thinking=thinking)

        def bare(check: _Check) -> Request:
            messages = self.dialect.messages(check.policy, check.content, "skip")
            return replace(generated(check, self.dialect.answer_tokens), messages=messages)

        def free(check: _Check) -> Request:
            budget = self.settings.max_reasoning_tokens + self.dialect.answer_tokens
            return generated(check, budget, thinking=True)

        await self._ask(checks, bare if mode == "never" else free, read)
        if mode == "adaptive" and (self.dialect.thought or self.dialect.mode_in_prompt):
            unclear = [check for check in checks if isinstance(check.error, VerdictError)]
            for check in unclear:
                check.error = None
            await self._ask(unclear, bare, read)

    async def _ask(
        self,
        checks: Sequence[_Check],
        request: Callable[[_Check], Request],
        read: Callable[[_Check, Completion], None],
        *,
        explains: bool = False,
    ) -> None:
        """One engine batch: a request a check, and what is read from each completion.

        A single request goes together with those of other callers.

        Whatever goes wrong becomes the check's error, never its verdict; where the batch only explains a
        verdict, it changes nothing.
        """
        checks = [check for check in checks if check.error is None]
        if not checks:
            return
        requests = [request(check) for check in checks]
        if len(requests) == 1 and not self.backend.joins_callers:
            completions: Sequence[Completion | BackendError] = [
                await self._joiner.complete(requests[0], checks[0].caller)
            ]
        else:
            completions = await self._complete(requests)
        for check, completion in zip(checks, completions, strict=True):
            try:
                if isinstance(completion, BackendError):
                    raise completion
                check.usage += completion.usage
                read(check, completion)
            except RSafeError as error:
                if not explains:
                    check.label, check.error = None, error
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                if not explains:
                    check.label = None
                    check.error = BackendError(
                        f"The engine {self.backend.model} answered with something that is no completion "
                        f"({type(error).__name__})."
                    )

    async def _complete(self, requests: Sequence[Request]) -> Sequence[Completion | BackendError]:
        completions = await self._engine(self.backend.complete(requests))
        if isinstance(completions, BackendError):
            return [completions] * len(requests)
        if not isinstance(completions, list) or len(completions) != len(requests):
            failure = BackendError(
                f"The engine {self.backend.model} didn't answer each of {len(requests)} requests."
            )
            return [failure] * len(requests)
        return completions

    async def _engine(self, work: Awaitable[T]) -> T | BackendError:
        """What the engine gives; whatever it raises comes back as an error."""
        try:
            return await work
        except BackendError as error:
            return error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this check, so it isn't the caller's cancellation but the engine's failure.
            return self._failure(error)
        except BaseException as error:
            # An engine that exits, too: it would take the loop of all guards with it.
            return self._failure(error)

    def _failure(self, error: BaseException) -> BackendError:
        # An engine's own message may quote what it was asked, so only its kind is passed on, and no cause.
        return BackendError(f"The engine {self.backend.model} failed with {type(error).__name__}.")

    def _verdict(self, check: _Check, latency: float, *, cached: bool) -> Verdict:
        if check.error is None and check.label is None:
            check.error = BackendError("The guard came to no verdict.")
        if check.error is not None and self.settings.on_error == "raise":
            raise check.error
        known: tuple[str, ...] = ()
        unknown: tuple[str, ...] = ()
        if check.label == "unsafe":
            known = check.named
            if not known:
                known, unknown = named_categories(check.thought, check.conclusion, self.policy)
        failed = check.error is not None
        return Verdict(
            label=None if failed else check.label,
            blocked=self.settings.on_error == "block" if failed else check.label == "unsafe",
            score=None if failed else check.score,
            categories=known,
            unknown_categories=unknown,
            reasoning=check.thought,
            error=str(check.error) if failed else None,
            policy=self.policy.name,
            model=self.backend.model,
            usage=Usage() if cached else check.usage,
            part=check.part,
            latency_ms=latency,
        )


def _fitting(policy: Policy, tokens: int) -> Policy:
    """The policy within its budget, said where that costs something."""
    fitting, dropped = condensed(policy, tokens)
    if dropped:
        log.warning(
            "%d examples of the policy %s were left out of the prompt, which may take %d tokens of it.",
            dropped,
            policy.name,
            tokens,
        )
    return fitting


def _categories(check: _Check) -> tuple[Category, ...]:
    return () if check.error is not None else check.policy.for_kind(check.content.kind).categories


def _worst_part(check: _Check) -> Content:
    """What its verdict is of."""
    content = check.content
    return content if check.part is None else replace(content, text=content.text[slice(*check.part)])


def _log_odds(check: _Check) -> float:
    """How sure the guard is that what was asked about is met."""
    met = min(max(check.score or 0.0, 1e-6), 1 - 1e-6)
    return math.log(met / (1 - met))


def _fit(one: _Check, other: _Check) -> float:
    """How likely the first is what was asked about, if one of the two is."""
    return 1 / (1 + math.exp(_log_odds(other) - _log_odds(one)))


def _best_fitting(asked: Sequence[_Check]) -> tuple[str, ...]:
    """The category that fits best, and others that are met and fit nearly as well."""
    best = max(asked, key=_log_odds)
    return tuple(
        one.policy.categories[0].id
        for one in asked
        if one is best or (one.label == "unsafe" and _fit(one, best) >= _LEAST_FIT)
    )


def _named(labels: Mapping[str, Label]) -> str:
    return " or ".join(dict.fromkeys(word.strip() for word in labels))


def _key(content: Content) -> bytes:
    """Stands for a content without holding its text."""
    return hashlib.blake2b(repr(content).encode("utf-8"), digest_size=16).digest()


def _listed(contents: Iterable[Content | str]) -> list[Content | str]:
    if isinstance(contents, str | Content):
        raise TypeError(
            f"check_many takes a list of contents, not one {type(contents).__name__}; use check for one."
        )
    if not isinstance(contents, Iterable):
        raise TypeError(f"check_many takes a list of contents, not {type(contents).__name__}.")
    return list(contents)


def _content(content: Content | str) -> Content:
    if isinstance(content, Content):
        return content
    if isinstance(content, str):
        return Content.prompt(content)
    raise TypeError(f"A guard judges a Content or a str, not {type(content).__name__}.")


def _halves(content: Content, span: Span) -> tuple[Span, ...]:
    if content.size > MOST_CHARACTERS:
        return ()
    return halves(content.text, span) or ()
