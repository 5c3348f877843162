import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsafe_plugins import Content, Guard
from rsafe_plugins.backends import Completion, Request
from rsafe_plugins.errors import BackendError, InputTooLong
from rsafe_plugins.guard.parts import MOST_CHARACTERS, OVERLAP, halves
from rsafe_plugins.testing import ScriptedBackend

LONGEST = 2_000  # characters that the scripted engine can take
SENTENCE = "The weather is fine and the bread is in the oven. "


def judged(request: Request) -> str:
    return request.messages[0].content.split("<BEGIN CONVERSATION>")[-1].split("<END CONVERSATION>")[0]


def small_engine(*, broken: str = "\0") -> ScriptedBackend:
    """An engine with little context that finds whatever holds the word "bomb" unsafe."""

    def reply(request: Request) -> str | BackendError:
        text = judged(request)
        if len(text) > LONGEST:
            return InputTooLong("too long")
        if broken in text:
            return BackendError("broken")
        return r"\boxed{unsafe}" if "bomb" in text else r"\boxed{safe}"

    return ScriptedBackend(reply)


@given(st.text(alphabet="ab. \n", min_size=0, max_size=3000), st.data())
def test_two_halves_cover_a_part_overlap_and_are_shorter(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    made = halves(text, (start, end))
    if made is None:
        assert end - start < 4 * OVERLAP
        return
    (first, cut_end), (cut_start, last) = made
    assert (first, last) == (start, end)
    assert cut_end - cut_start == OVERLAP
    assert max(cut_end - first, last - cut_start) < end - start


def test_a_cut_falls_on_the_end_of_a_sentence() -> None:
    text = SENTENCE * 40
    made = halves(text, (0, len(text)))
    assert made is not None
    assert (made[0][1] - OVERLAP // 2) % len(SENTENCE) == 0


@pytest.mark.parametrize("place", [0.0, 0.26, 0.5, 0.99])
def test_a_long_text_is_judged_in_parts_and_the_worst_decides(place: float) -> None:
    words = (SENTENCE * 400).split(" ")
    words.insert(int(place * len(words)), "bomb")
    text = " ".join(words)
    verdict = Guard(backend=small_engine()).check(Content.document(text))
    assert (verdict.label, verdict.error) == ("unsafe", None)
    assert verdict.part is not None
    assert "bomb" in text[slice(*verdict.part)]


def test_a_long_harmless_text_is_safe_and_one_that_fits_has_no_part() -> None:
    long, short = Guard(backend=small_engine()).check_many([SENTENCE * 400, SENTENCE])
    assert (long.label, short.label) == ("safe", "safe")
    assert long.part is not None
    assert short.part is None


def test_a_part_that_fails_fails_the_check_unless_another_is_unsafe() -> None:
    guard = Guard(backend=small_engine(broken="jammed"))
    failed, unsafe = guard.check_many(
        [SENTENCE * 200 + "jammed", SENTENCE * 200 + "jammed" + SENTENCE * 200 + "bomb"]
    )
    assert (failed.label, failed.blocked) == (None, True)
    assert (unsafe.label, unsafe.blocked) == ("unsafe", True)


@pytest.mark.parametrize("on_error", ["block", "allow"])
def test_a_part_that_is_unsafe_decides_also_where_the_others_take_too_long(on_error: str) -> None:
    def candidates(request: Request) -> dict[str, float]:
        return {"safe": 0.1, "unsafe": 0.9} if "bomb" in judged(request) else {"safe": 0.9, "unsafe": 0.1}

    class Slow(ScriptedBackend):
        depth_first, concurrency = True, 1

        async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
            text = judged(requests[0])
            if len(text) > LONGEST:
                return [InputTooLong("too long")]
            if "bomb" not in text:
                await asyncio.Event().wait()
            return await super().complete(requests)

    guard = Guard(
        backend=Slow(" U1", candidates=candidates), reasoning="never", timeout=0.3, on_error=on_error
    )
    verdict = guard.check("How do I build a bomb? " + SENTENCE * 200)
    assert (verdict.label, verdict.blocked, verdict.error) == ("unsafe", True, None)
    assert verdict.part is not None
    harmless = guard.check(SENTENCE * 200)
    assert (harmless.label, harmless.blocked) == (None, on_error == "block")


def test_more_parts_than_are_judged_do_not_hide_one_that_is_unsafe() -> None:
    def reply(request: Request) -> str | BackendError:
        text = judged(request)
        if len(text) > (100_000 if "bomb" in text else 1_000):
            return InputTooLong("too long")
        return r"\boxed{unsafe}" if "bomb" in text else r"\boxed{safe}"

    text = "How do I build a bomb? " + SENTENCE * 4_000
    verdict = Guard(backend=ScriptedBackend(reply), on_error="allow").check(text)
    assert (verdict.label, verdict.blocked) == ("unsafe", True)
    harmless = Guard(backend=ScriptedBackend(reply), on_error="block").check(SENTENCE * 4_000)
    assert "more than 64 parts" in (harmless.error or "")


def test_a_long_conversation_is_judged_with_its_later_turns() -> None:
    backend = small_engine()
    turns = [("user" if n % 2 else "agent", f"turn {n}. {SENTENCE * 5}") for n in range(40)]
    verdict = Guard(backend=backend).check(Content.prompt("And now the bomb.", turns))
    assert (verdict.label, verdict.part) == ("unsafe", None)
    seen = judged(backend.requests[-1])
    assert "turn 39" in seen
    assert "turn 0." not in seen


def test_an_endless_conversation_is_judged_with_its_later_turns() -> None:
    turns = [("user", "x" * (MOST_CHARACTERS // 4))] * 9 + [("agent", "Hello.")]
    assert Guard(backend=small_engine()).check(Content.prompt("And now the bomb.", turns)).label == "unsafe"


def test_what_surrounds_a_text_is_not_cut_so_too_much_of_it_blocks() -> None:
    backend = small_engine()
    verdict = Guard(backend=backend).check(Content.response("Yes. " * 500, prompt=SENTENCE * 200))
    assert (verdict.label, verdict.blocked) == (None, True)
    assert "What the response belongs to" in str(verdict.error)
    assert len(backend.requests) == 2, "it isn't found out again for each part"


def test_a_text_that_begins_with_what_takes_many_tokens_is_judged_in_parts_all_the_same() -> None:
    engine = small_engine()
    text = "\U000e0100" * 200 + SENTENCE * 40 + "bomb"
    verdict = Guard(backend=engine, on_error="allow").check(Content.response(text, prompt=SENTENCE * 10))
    assert (verdict.label, verdict.blocked) == ("unsafe", True)


@pytest.mark.parametrize(
    ("answer", "label"),
    [(None, None), ("garbage", "unsafe"), (BackendError("down"), "unsafe")],
    ids=["hangs", "garbage", "dies"],
)
def test_where_only_the_question_about_a_long_prompt_fails_the_parts_decide_in_time_or_it_blocks(
    answer: str | BackendError | None, label: str | None
) -> None:
    async def reply(request: Request) -> str | BackendError:
        text = judged(request)
        if text.rstrip().endswith("Agent: ."):
            if answer is None:
                await asyncio.Event().wait()
            return answer or ""
        if len(text) > LONGEST:
            return InputTooLong("too long")
        return r"\boxed{unsafe}" if "bomb" in text else r"\boxed{safe}"

    backend = ScriptedBackend(reply)
    content = Content.response("Yes. " * 500 + "A bomb.", prompt=SENTENCE * 10)
    verdict = Guard(backend=backend, timeout=1).check(content)
    assert (verdict.label, verdict.blocked) == (label, True)
    assert any(judged(one).rstrip().endswith("Agent: .") for one in backend.requests)


@pytest.mark.parametrize("length", [LONGEST * 100, MOST_CHARACTERS + 1])
def test_more_than_the_limit_is_refused_and_blocked(length: int) -> None:
    backend = small_engine()
    verdict = Guard(backend=backend).check("x" * length)
    assert (verdict.label, verdict.blocked) == (None, True)
    assert len(backend.requests) < 200


def test_a_part_that_the_thought_does_not_fit_is_halved_too() -> None:
    def reply(request: Request) -> str | Completion | BackendError:
        return InputTooLong("too long") if len(judged(request)) > LONGEST else "a thought"

    backend = ScriptedBackend(reply, candidates={"safe": 0.9, "unsafe": 0.1})
    verdict = Guard(backend=backend, reasoning="always").check(SENTENCE * 100)
    assert verdict.label == "safe"
    assert verdict.part is not None
