"""The saved beginnings of prompts, with the real engine and the packaged guard."""

import asyncio
from pathlib import Path

import pytest

from rsafe_plugins import Guard, Policy, Verdict
from rsafe_plugins.backends import LlamaCppBackend
from rsafe_plugins.backends.llamacpp import _Gate
from rsafe_plugins.backends.prefixes import MOST_KEPT
from rsafe_plugins.backends.weights import cache_folder

pytestmark = pytest.mark.engine

RULES = Policy.model_validate(
    {
        "name": "rules",
        "categories": [
            {"id": f"R{number}", "name": f"Rule {number}", "description": "Orders, threats and insults."}
            for number in range(2)
        ],
    }
)
SECRET = "My bank account is 4711 and nobody may ever know that it is."


@pytest.fixture(scope="module")
def weights() -> list[Path]:
    """The files of a cache that holds the packaged guard."""
    asyncio.run(start(LlamaCppBackend()))
    return list(cache_folder().glob("*.gguf*"))


@pytest.fixture
def cache(weights: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the weights and without saved beginnings."""
    for path in weights:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("RSAFE_CACHE_DIR", str(tmp_path))
    return tmp_path


async def start(backend: LlamaCppBackend) -> None:
    await backend.start()
    await backend.aclose()


def checked(text: str = SECRET, policy: Policy = RULES) -> Verdict:
    """A verdict from an engine of its own."""
    backend = LlamaCppBackend()
    verdict = Guard(policy, backend=backend, reasoning="never", threshold=1.0, timeout=300).check(text)
    asyncio.run(backend.aclose())
    assert verdict.error is None
    return verdict


def saved(cache: Path) -> list[Path]:
    return sorted((cache / "prefixes").glob("*"))


def test_a_second_process_begins_where_the_policy_ends_and_nothing_that_was_judged_is_kept(
    cache: Path,
) -> None:
    first, again, other = checked(), checked(), checked("Hello.")
    assert len(saved(cache)) == 1
    assert again.score == pytest.approx(first.score, abs=0.01)
    content = first.usage.prompt_tokens - again.usage.cached_tokens
    assert len(SECRET.split()) <= content < 60
    assert abs(again.usage.cached_tokens - other.usage.cached_tokens) <= 1


def test_a_damaged_file_is_computed_again_and_replaced(cache: Path) -> None:
    checked()
    (path,) = saved(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    checked()
    assert path.read_bytes() == whole


def test_another_policy_does_not_take_it(cache: Path) -> None:
    checked()
    (first,) = saved(cache)
    before = first.read_bytes()
    checked(policy=RULES.model_copy(update={"categories": RULES.categories[::-1]}))
    assert len(saved(cache)) == 2
    assert first.read_bytes() == before


def test_few_are_kept_and_those_used_last(cache: Path) -> None:
    (cache / "prefixes").mkdir()
    for number in range(MOST_KEPT + 3):
        (cache / "prefixes" / f"{number}.prefix").touch()
    checked()
    kept = saved(cache)
    assert len(kept) == MOST_KEPT
    assert any(path.stat().st_size for path in kept)


def test_a_cache_that_cannot_be_written_costs_no_verdict(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "replace", refuse)
    assert checked().label == "safe"
    assert saved(cache) == []


def test_a_model_of_the_users_own_leaves_nothing_behind(cache: Path) -> None:
    backend = LlamaCppBackend(next(cache.glob("*Q4_1.gguf")))
    verdict = Guard(RULES, backend=backend, reasoning="never", timeout=300).check(SECRET)
    asyncio.run(backend.aclose())
    assert verdict.usage.prompt_tokens > 200
    assert saved(cache) == []


def test_each_content_of_a_list_is_computed_once(cache: Path) -> None:
    backend = LlamaCppBackend()
    guard = Guard(RULES, backend=backend, reasoning="never", threshold=0.0, timeout=300)
    texts = [f"{SECRET} {number}." for number in range(3)]
    guard.check(SECRET)
    verdicts = guard.check_many(texts)
    asyncio.run(backend.aclose())
    for verdict in verdicts:
        # The verdict's request and the one that names the categories, which shares all but its last tokens.
        new = verdict.usage.prompt_tokens - verdict.usage.cached_tokens
        assert 0 < new < 100
        assert verdict.usage.prompt_tokens > 2 * new


async def test_while_a_prefix_is_saved_no_other_request_is_let_in() -> None:
    gate = _Gate(asyncio.get_running_loop(), 2)
    order: list[str] = []

    async def request(name: str) -> None:
        async with gate.places:
            order.append(f"{name} in")
            await asyncio.sleep(0)
            order.append(f"{name} out")

    async def saving() -> None:
        async with gate.alone():
            order.append("saving")
            for _ in range(5):
                await asyncio.sleep(0)
            order.append("saved")

    await asyncio.gather(request("a"), request("b"), saving(), saving(), request("c"))
    for start in (place for place, step in enumerate(order) if step == "saving"):
        assert order[start + 1] == "saved"
        inside = [step.split()[0] for step in order[:start] if step.endswith(" in")]
        assert all(f"{name} out" in order[:start] for name in inside)
    assert order.count("saved") == 2
    assert order.count("c out") == 1


async def test_a_save_that_is_cancelled_gives_its_places_back() -> None:
    gate = _Gate(asyncio.get_running_loop(), 2)
    async with gate.places:
        waiting = asyncio.create_task(gate.alone().__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with asyncio.timeout(5), gate.alone():
        pass
