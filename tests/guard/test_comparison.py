"""What is unsafe, asked about category by category: to compare it with what the policy leaves out, and to name it."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rsafe_plugins import BackendError, Category, Content, Guard, Policy, SettingsError
from rsafe_plugins.backends import Completion, Request, Usage
from rsafe_plugins.errors import InputTooLong
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.evaluation.run import judge
from rsafe_plugins.guard import loop
from rsafe_plugins.guard.fitted import OperatingPoint, write
from rsafe_plugins.testing import ScriptedBackend

THEFT, HATE = Category(id="A", name="Theft"), Category(id="B", name="Hate")
POLICY = Policy(name="house", categories=(THEFT, HATE))
LEFT_OUT = 15  # of rsafe-18's


def is_second(request: Request) -> bool:
    return "\nCategory: " in request.messages[-1].content


def probabilities(unsafe: float = 0.9, **of: float) -> Callable[[Request], dict[str, float]]:
    """One for the whole policy and one for each category: 0.1, but for drugs 0.5."""

    def candidates(request: Request) -> dict[str, float]:
        name = request.messages[-1].content.rpartition("\nCategory: ")[2].split(".")[0].split()[0].casefold()
        probability = {"drugs": 0.5, **of}.get(name, 0.1) if is_second(request) else unsafe
        return {"safe": 1 - probability, "unsafe": probability}

    return candidates


def engine(unsafe: float = 0.9, **of: float) -> ScriptedBackend:
    return ScriptedBackend(
        lambda request: "a thought" if request.prefill == "<think>" else " A",
        candidates=probabilities(unsafe, **of),
    )


def words(second: Callable[[str], bool]) -> Callable[[Request], dict[str, float]]:
    """Everything is unsafe, and about drugs, unless the prompt's words say that it meets a category."""

    def candidates(request: Request) -> dict[str, float]:
        prompt = request.messages[-1].content
        met = 0.99 if second(prompt) else 0.5 if "Category: Drugs" in prompt else 0.01
        probability = met if is_second(request) else 0.9
        return {"safe": 1 - probability, "unsafe": probability}

    return candidates


Completions = list[Completion | BackendError]


class Faulty(ScriptedBackend):
    """An engine in which everything is about drugs, and whose second answers a fault makes, until it is well."""

    def __init__(self, fault: Callable[[Completions], Awaitable[Completions]]) -> None:
        super().__init__(candidates=probabilities())
        self.fault, self.well = fault, False

    async def complete(self, requests: Sequence[Request]) -> Completions:
        completions = await super().complete(requests)
        return completions if self.well or not is_second(requests[0]) else await self.fault(completions)


async def down(completions: Completions) -> Completions:
    return [BackendError("down")] * len(completions)


async def partly_down(completions: Completions) -> Completions:
    return [BackendError("down"), *completions[1:]]


async def too_long(completions: Completions) -> Completions:
    raise InputTooLong("long")


async def broken(completions: Completions) -> Completions:
    raise RuntimeError("broken")


async def garbage(completions: Completions) -> Completions:
    return [Completion(logprobs={"safe": -30.0, "unsafe": -30.0})] * len(completions)


async def not_a_number(completions: Completions) -> Completions:
    return [Completion(logprobs={"safe": math.nan, "unsafe": math.nan})] * len(completions)


async def hanging(completions: Completions) -> Completions:
    return await asyncio.Event().wait()  # type: ignore[return-value]


def guard(backend: ScriptedBackend, policy: Policy = POLICY, **settings: object) -> Guard:
    given = {"reasoning": "never", "threshold": 0.4, "category_threshold": 0.5, **settings}
    return Guard(policy, backend=backend, **given)  # type: ignore[arg-type]


def test_what_a_category_of_the_policy_fits_best_stays_unsafe_and_names_it() -> None:
    verdict = guard(engine(hate=0.9)).check("x")
    assert (verdict.label, verdict.score, verdict.categories) == ("unsafe", pytest.approx(0.9), ("B",))
    # Others are named beside it that are met and fit nearly as well.
    assert guard(engine(hate=0.9, theft=0.8)).check("x").categories == ("A", "B")
    assert guard(engine(hate=0.9, theft=0.6)).check("x").categories == ("B",)
    assert guard(engine(hate=0.5, theft=0.45)).check("x").categories == ("B",)
    # What meets none of those that are left out stays, though nothing of its own fits well.
    assert guard(engine(hate=0.05, theft=0.01, drugs=0.45)).check("x").categories == ("B",)


def test_what_one_that_is_left_out_fits_better_is_safe_by_as_much_as_that() -> None:
    verdict = guard(engine(theft=0.2)).check("x")
    assert (verdict.label, verdict.blocked, verdict.categories) == ("safe", False, ())
    odds = 0.2 / 0.8
    assert verdict.score == pytest.approx(0.4 * (odds / (odds + 1)) / 0.5)


@pytest.mark.parametrize(("threshold", "blocked"), [(0.1, True), (0.19, True), (0.21, False), (0.99, False)])
def test_the_threshold_is_how_well_it_must_fit(threshold: float, blocked: bool) -> None:
    # Odds of 1 to 4 against even odds: it is the better fit with a probability of 0.2.
    assert guard(engine(theft=0.2), category_threshold=threshold).check("x").blocked is blocked


@pytest.mark.parametrize(
    "policy",
    [
        Policy.load("rsafe-18"),
        Policy.load("mlcommons"),
        POLICY.model_copy(update={"categories": (THEFT, Category(id="C", name="Competitors"))}),
    ],
    ids=["it has them all", "another taxonomy", "one that nobody knows"],
)
def test_a_policy_that_leaves_nothing_out_or_nobody_knows_what_is_not_compared(policy: Policy) -> None:
    backend = engine()
    assert guard(backend, policy, name_categories=False).check("x").blocked
    assert not any(map(is_second, backend.requests))


def test_a_bound_is_no_answer() -> None:
    class Bounding(ScriptedBackend):
        async def complete(self, requests: Sequence[Request]) -> Completions:
            completions = await super().complete(requests)
            return [
                replace(one, bounded=frozenset({"unsafe"}) if is_second(request) else frozenset())
                for request, one in zip(requests, completions, strict=True)
                if isinstance(one, Completion)
            ]

    assert guard(Bounding(candidates=probabilities(drugs=0.9))).check("x").blocked


def test_examples_that_the_prompt_has_no_room_for_still_count_as_the_policys() -> None:
    theft = THEFT.model_copy(update={"examples": ("Where do I steal drugs? " * 40,)})
    policy = Policy(name="house", categories=(theft, HATE))
    roomy, tight = (guard(engine(), policy, policy_tokens=tokens) for tokens in (2000, 100))
    assert tight.policy != roomy.policy
    assert tight.compared_with("prompt") == roomy.compared_with("prompt")


def test_an_engine_that_only_writes_is_not_asked_about_categories() -> None:
    backend = ScriptedBackend(r"\boxed{unsafe}")
    assert guard(backend).check("x").blocked
    assert not any(map(is_second, backend.requests))


def test_the_verdict_follows_the_policy() -> None:
    backend = engine(hate=0.9)
    assert guard(backend).check("x").blocked
    assert not guard(backend, Policy(name="house", categories=(THEFT,))).check("x").blocked


def test_what_is_safe_takes_one_request_and_nothing_makes_it_unsafe() -> None:
    backend = engine(0.1, hate=0.9, drugs=0.1)
    assert guard(backend).check("x").label == "safe"
    assert len(backend.requests) == 1


@pytest.mark.parametrize("on_error", ["block", "allow", "raise"])
@pytest.mark.parametrize(
    "fault", [down, partly_down, too_long, broken, garbage, not_a_number, hanging], ids=lambda f: f.__name__
)
def test_what_fails_the_second_time_stays_unsafe(
    fault: Callable[[Completions], Awaitable[Completions]], on_error: str
) -> None:
    verdict = guard(Faulty(fault), on_error=on_error, timeout=0.2).check("x")
    assert (verdict.label, verdict.blocked, verdict.categories) == ("unsafe", True, ())


async def test_two_hundred_at_once_get_their_own_answers() -> None:
    texts = [f"{'hateful' if n % 3 else 'mild'} text {n}" for n in range(200)]
    asked = guard(ScriptedBackend(candidates=words(lambda prompt: "hateful" in prompt)))
    verdicts = await asyncio.gather(*(asked.acheck(text) for text in texts))
    assert [verdict.blocked for verdict in verdicts] == [bool(n % 3) for n in range(200)]


@pytest.mark.parametrize(
    "content",
    [Content.document("d"), Content.tool_call("send", {"to": "x"}), Content.tool_result("r", name="send")],
    ids=lambda content: content.kind,
)
def test_only_prompts_and_responses_are_asked_about_again(content: Content) -> None:
    backend = engine()
    assert guard(backend).check(content).blocked
    assert not any(map(is_second, backend.requests))


def test_a_verdict_after_a_thought_is_not_asked_about_again() -> None:
    backend = engine()
    verdict = guard(backend, reasoning="adaptive", band=(0.0, 1.0)).check("x")
    assert (verdict.blocked, verdict.reasoning) == (True, "a thought")
    assert not any(map(is_second, backend.requests))


def test_the_fitted_threshold_counts_unless_another_is_given(tmp_path: Path) -> None:
    file = tmp_path / "fitted.yaml"
    write(file, "scripted", {"house": OperatingPoint(threshold=0.4, category_threshold=0.5)})
    fitted = Guard(POLICY, backend=engine(), reasoning="never", threshold=file)
    assert not fitted.check("x").blocked
    for given, requests in ((0, 0), (0.05, 2 + LEFT_OUT)):
        backend = engine()
        own = Guard(POLICY, backend=backend, reasoning="never", threshold=file, category_threshold=given)
        assert own.check("x").blocked
        assert sum(map(is_second, backend.requests)) == requests


def test_a_guard_that_can_not_be_asked_so_says_it() -> None:
    with pytest.raises(SettingsError, match="dialect llama-guard isn't asked category by category"):
        guard(engine(), dialect="llama-guard")
    with pytest.raises(SettingsError, match="always thinks isn't asked category by category"):
        guard(engine(), reasoning="always")


def test_a_threshold_of_zero_blocks_everything_and_nothing_is_asked() -> None:
    backend = engine()
    assert guard(backend, threshold=0.0, name_categories=False).check("x").blocked
    assert not any(map(is_second, backend.requests))


def test_a_model_that_is_known_late_is_asked_by_what_was_fitted_for_it(tmp_path: Path) -> None:
    class Late(ScriptedBackend):
        async def prepare(self) -> None:
            self.model = "served"

    file = tmp_path / "fitted.yaml"
    write(file, "served", {"house": OperatingPoint(threshold=0.4, category_threshold=0.5)})
    backend = Late(candidates=probabilities())
    assert not Guard(POLICY, backend=backend, reasoning="never", threshold=file).check("x").blocked


class Slow(ScriptedBackend):
    """An engine for one request at a time, whose second answers come after so many seconds."""

    depth_first, concurrency = True, 1

    def __init__(self, seconds: Callable[[str], float]) -> None:
        super().__init__(candidates=words(lambda prompt: "harm" in prompt))
        self.seconds = seconds

    async def complete(self, requests: Sequence[Request]) -> Completions:
        second = is_second(requests[0])
        await asyncio.sleep(self.seconds(requests[0].messages[-1].content) if second else 0.2)
        return await super().complete(requests)


def test_the_second_question_has_as_much_time_as_the_first() -> None:
    slow = Slow(lambda prompt: 0.2 / (2 + LEFT_OUT))
    verdicts = guard(slow, timeout=0.3, on_error="allow").check_many(["mild", "harm"])
    assert [verdict.label for verdict in verdicts] == ["safe", "unsafe"]


def test_a_second_question_that_hangs_takes_no_time_from_other_checks() -> None:
    slow = Slow(lambda prompt: 60 if "stuck" in prompt else 0)
    verdicts = guard(slow, timeout=0.3, on_error="allow").check_many(["stuck", "mild", "harm"])
    assert [verdict.label for verdict in verdicts] == ["unsafe", "safe", "unsafe"]


@pytest.mark.parametrize("fault", [down, hanging], ids=lambda f: f.__name__)
def test_what_stayed_unsafe_for_a_failure_is_not_kept(
    fault: Callable[[Completions], Awaitable[Completions]], caplog: pytest.LogCaptureFixture
) -> None:
    backend = Faulty(fault)
    asked = guard(backend, cache=3600, timeout=0.2)
    assert asked.check("x").blocked
    assert "couldn't be compared with what the policy leaves out" in caplog.text
    backend.well = True
    assert not asked.check("x").blocked
    count = len(backend.requests)
    assert not asked.check("x").blocked
    assert len(backend.requests) == count


def test_what_was_never_compared_since_time_ran_out_before_is_not_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Thinking(ScriptedBackend):
        hangs = True

        async def complete(self, requests: Sequence[Request]) -> Completions:
            if self.hangs and requests[0].prefill == "<think>":
                await asyncio.Event().wait()
            return await super().complete(requests)

    def candidates(request: Request) -> dict[str, float]:
        if not is_second(request) and "unsure" in request.messages[-1].content:
            return {"safe": 0.5, "unsafe": 0.5}
        return probabilities()(request)

    backend = Thinking("a thought", candidates=candidates)
    asked = guard(backend, cache=3600, timeout=0.2, reasoning="adaptive", band=(0.4, 0.6))
    off_policy, unsure = asked.check_many(["off policy", "unsure"])
    assert (off_policy.label, unsure.error) == ("unsafe", "The guard model gave no verdict within 0.4 s.")
    assert "couldn't be compared with what the policy leaves out" in caplog.text
    backend.hangs = False
    assert asked.check("off policy").label == "safe"


def test_what_stayed_unsafe_for_a_failure_is_judged_again_by_the_next_run(tmp_path: Path) -> None:
    backend, store = Faulty(down), tmp_path / "verdicts.jsonl"
    items = [LabelledItem(id="1", task="prompt", prompt="x", label="safe")]
    assert judge(items, lambda item: guard(backend), store)[0].blocked
    backend.well = True
    assert not judge(items, lambda item: guard(backend), store)[0].blocked
    backend.well = False
    assert not judge(items, lambda item: guard(backend), store)[0].blocked
    # Another threshold of categories is another verdict.
    assert judge(items, lambda item: guard(backend, category_threshold=0.01), store)[0].blocked


def test_the_tokens_of_both_questions_are_counted() -> None:
    class Counting(ScriptedBackend):
        async def complete(self, requests: Sequence[Request]) -> Completions:
            completions = await super().complete(requests)
            return [replace(one, usage=Usage(10)) for one in completions if isinstance(one, Completion)]

    assert guard(Counting(candidates=probabilities())).check("x").usage.prompt_tokens == 10 * (
        1 + 2 + LEFT_OUT
    )


class Short(ScriptedBackend):
    """An engine that takes no more than 1,200 times "word"."""

    async def complete(self, requests: Sequence[Request]) -> Completions:
        completions = await super().complete(requests)
        return [
            InputTooLong("long") if request.messages[-1].content.count("word") > 1200 else completion
            for request, completion in zip(requests, completions, strict=True)
        ]


def test_a_text_in_parts_is_asked_about_part_by_part() -> None:
    asked = guard(Short(candidates=words(lambda prompt: "hateful" in prompt and "Category: Hate" in prompt)))
    text = "word " * 2000
    assert not asked.check(text).blocked
    verdict = asked.check(text + "hateful")
    assert (verdict.blocked, verdict.categories) == (True, ("B",))
    assert verdict.part is not None


WHOLE = Policy.load("rsafe-18")
RIVALS = Category(id="R", name="Rivals", description="Naming another maker of bicycles.")
HOUSE = Policy(name="house", categories=(WHOLE.categories[2], RIVALS))  # nobody knows what it leaves out


def named(backend: ScriptedBackend, policy: Policy = WHOLE, **settings: object) -> tuple[str, ...]:
    verdict = guard(backend, policy, **settings).check("x")
    assert verdict.blocked
    return verdict.categories


def second(backend: ScriptedBackend) -> list[str]:
    """What follows the content in the questions about categories."""
    prompts = [request.messages[-1].content for request in backend.requests if is_second(request)]
    return [prompt.rpartition("\nCategory: ")[2].strip() for prompt in prompts]


def test_what_is_unsafe_under_a_whole_policy_is_named_by_its_categories_one_by_one() -> None:
    assert named(engine(weapons=0.9)) == ("U2",)
    # Others that are met are named beside it if they fit nearly as well; the best is named though it isn't met.
    assert named(engine(hate=0.9, weapons=0.8)) == ("U2", "U7")
    assert named(engine(hate=0.95, weapons=0.8)) == ("U7",)
    assert named(engine(weapons=0.45, drugs=0.4)) == ("U2",)
    backend = engine()
    named(backend)
    assert len(second(backend)) == len(WHOLE.categories)
    # What the model would write isn't asked for.
    assert not any("Categories" in request.prefill for request in backend.requests)


def test_known_categories_are_asked_about_by_name_and_others_in_all_their_words() -> None:
    backend = engine(rivals=0.9)
    assert named(backend, HOUSE) == ("R",)
    assert second(backend) == ["Non-violent Crime & Fraud.", "Rivals. Naming another maker of bicycles."]


def test_the_only_category_needs_no_question() -> None:
    for content in (Content.prompt("x"), Content.document("x")):
        backend = engine()
        verdict = guard(backend, Policy(name="one", categories=(RIVALS,))).check(content)
        assert (verdict.blocked, verdict.categories) == (True, ("R",))
        assert len(backend.requests) == 1


def test_a_model_that_was_not_fitted_for_it_writes_the_names() -> None:
    backend = engine(hate=0.9)
    assert named(backend, POLICY, category_threshold=0) == ("A",)
    assert not second(backend)


@pytest.mark.parametrize("on_error", ["block", "allow", "raise"])
@pytest.mark.parametrize(
    "fault", [down, partly_down, too_long, broken, garbage, not_a_number, hanging], ids=lambda f: f.__name__
)
def test_what_can_not_be_named_stays_unsafe_and_the_log_says_so(
    fault: Callable[[Completions], Awaitable[Completions]], on_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    verdict = guard(Faulty(fault), WHOLE, on_error=on_error, timeout=0.2).check("x")
    assert (verdict.label, verdict.blocked, verdict.categories) == ("unsafe", True, ())
    assert "couldn't be named" in caplog.text


def test_no_verdict_of_a_list_waits_for_names() -> None:
    class Once(ScriptedBackend):
        depth_first, concurrency = True, 1

    backend = Once(candidates=probabilities(hate=0.9))
    verdicts = guard(backend, WHOLE).check_many([f"text {number}" for number in range(3)])
    assert [verdict.categories for verdict in verdicts] == [("U7",)] * 3
    assert [is_second(request) for request in backend.requests] == [False] * 3 + [True] * 54


async def test_who_waits_for_a_content_that_is_being_named_gets_its_verdict() -> None:
    class Stuck(ScriptedBackend):
        naming = threading.Event()

        async def complete(self, requests: Sequence[Request]) -> Completions:
            if is_second(requests[0]):
                self.naming.set()
                await asyncio.Event().wait()
            return await super().complete(requests)

    backend = Stuck(candidates=probabilities())
    first = asyncio.create_task(guard(backend, WHOLE, timeout=1.0).acheck("x"))
    asked = guard(backend, WHOLE, timeout=1.0, on_error="allow")
    one = asyncio.create_task(asked.acheck_many(["x", "y"]))
    await asyncio.to_thread(backend.naming.wait, 60)
    late = await asked.acheck("y")
    for verdict in (late, await first, *await one):
        assert (verdict.label, verdict.blocked, verdict.categories) == ("unsafe", True, ())


def test_of_more_categories_than_can_be_asked_about_the_model_writes_the_names() -> None:
    many = tuple(Category(id=f"C{number}", name=f"Rivals {number}") for number in range(41))
    backend = ScriptedBackend(" C7", candidates=probabilities())
    assert named(backend, Policy(name="many", categories=many)) == ("C7",)
    assert not second(backend)


def test_ids_are_named_as_they_are() -> None:
    names = {"_a_": "Rivals", "a": "Hate", "*": "A, B"}
    odd = tuple(Category(id=one, name=name) for one, name in names.items())
    for place, first in enumerate(("rivals", "hate", "a,")):
        assert named(engine(**{first: 0.9}), Policy(name="odd", categories=odd)) == (odd[place].id,)


async def test_a_long_list_that_is_named_does_not_hold_up_other_guards() -> None:
    class Wide(ScriptedBackend):
        concurrency = 256

    contents = [f"text {number} " + "word " * 4000 for number in range(40)]
    asked = guard(Wide(candidates=probabilities(hate=0.9)), WHOLE)
    turns, ended = 0, False

    async def count() -> None:
        nonlocal turns
        while not ended:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(loop.run(count()))
    verdicts = await asked.acheck_many(contents)
    ended = True
    await counting
    assert all(verdict.categories == ("U7",) for verdict in verdicts)
    assert turns > len(contents)


def test_of_a_text_in_parts_the_worst_is_named_and_asked_about_alone() -> None:
    def candidates(request: Request) -> dict[str, float]:
        prompt = request.messages[-1].content
        met = "hateful" in prompt and (not is_second(request) or "Category: Hate" in prompt)
        return {"safe": 0.1, "unsafe": 0.9} if met else {"safe": 0.9, "unsafe": 0.1}

    backend = Short(candidates=candidates)
    verdict = guard(backend, WHOLE).check("word " * 2000 + "hateful")
    assert (verdict.blocked, verdict.categories) == (True, ("U7",))
    assert verdict.part is not None
    assert len(second(backend)) == len(WHOLE.categories)
