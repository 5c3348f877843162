"""The conformance kit passes what is right and fails what is wrong."""

from collections.abc import Callable, Sequence

import pytest

from rsafe_plugins.backends.base import Backend, Completion, Request
from rsafe_plugins.errors import BackendError
from rsafe_plugins.testing import ScriptedBackend
from rsafe_plugins.testing.conformance import BackendBasics, BackendConformance, assert_backends_agree


def echo(request: Request) -> str:
    return request.messages[-1].content


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(echo)


class TestScriptedBackend(BackendBasics):
    """A script has no engine, so it takes the part of the kit that holds for every backend."""


class Changed(ScriptedBackend):
    """A script whose answers are changed on their way."""

    def __init__(
        self,
        change: Callable[[list[Completion | BackendError]], list[Completion | BackendError]],
        **settings: object,
    ) -> None:
        super().__init__(echo, **settings)  # type: ignore[arg-type]
        self._change = change

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        return self._change(await super().complete(requests))


Case = Callable[[Backend], None]
basics, kit = BackendBasics(), BackendConformance()


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (lambda answers: answers[::-1], basics.test_each_request_is_answered_in_order),
        (lambda answers: answers[:1], basics.test_each_request_is_answered_in_order),
        (lambda answers: answers * 2, basics.test_many_callers_at_once_get_their_own_answers),
        (lambda answers: [BackendError("no")] * len(answers), basics.test_empty_content_is_answered),
        (lambda answers: answers, kit.test_an_input_that_is_too_long_is_an_error_of_its_own_request),
        (lambda answers: answers, kit.test_the_token_budget_is_kept),
        (lambda answers: answers, kit.test_generation_stops_before_a_stop_string),
    ],
)
def test_a_backend_that_breaks_the_contract_fails(
    change: Callable[[list[Completion | BackendError]], list[Completion | BackendError]], test: Case
) -> None:
    with pytest.raises(AssertionError):
        test(Changed(change))


def test_a_closed_backend_that_still_answers_fails() -> None:
    with pytest.raises(AssertionError):
        kit.test_a_closed_backend_is_unavailable_and_closing_twice_is_fine(lambda: ScriptedBackend(echo))


def likely(probability: float) -> ScriptedBackend:
    return ScriptedBackend("", candidates=lambda request: dict.fromkeys(request.candidates, probability))


def test_candidates_that_sum_to_more_than_one_fail() -> None:
    with pytest.raises(AssertionError):
        kit.test_probabilities_of_candidates_sum_to_at_most_one(likely(0.6))


def test_candidates_that_contradict_greedy_generation_fail() -> None:
    def scores(request: Request) -> dict[str, float]:
        return {name: 0.9 if name == " Berlin" else 0.01 for name in request.candidates}

    with pytest.raises(AssertionError):
        kit.test_candidates_agree_with_greedy_generation(ScriptedBackend(" Paris.", candidates=scores))


def test_a_prefill_that_is_repeated_fails() -> None:
    with pytest.raises(AssertionError):
        kit.test_a_prefill_is_continued_and_not_repeated(
            ScriptedBackend("1, 2, 3, 4, 5, 6", candidates={"safe": 1.0})
        )


def test_what_an_engine_says_it_cannot_do_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception):
        kit.test_candidates_are_scored_and_not_generated(ScriptedBackend(echo))


def test_backends_agree_within_the_tolerance_and_not_beyond() -> None:
    assert_backends_agree(likely(0.20), likely(0.24))

    with pytest.raises(AssertionError, match=r"differ by a probability of 0\.060 on request 0"):
        assert_backends_agree(likely(0.20), likely(0.26))
