from pathlib import Path

import pytest

from rsafe_plugins import BackendError, Guard
from rsafe_plugins.backends import Request
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.evaluation.run import engine_identity, judge, sample
from rsafe_plugins.testing import ScriptedBackend

ITEMS = [LabelledItem(id=str(n), task="prompt", prompt=f"text {n}", label="safe") for n in range(20)]


def answer(request: Request) -> str:
    return "\\boxed{unsafe}" if "text 7" in request.messages[0].content else "\\boxed{safe}"


def test_verdicts_come_in_the_items_order() -> None:
    guard = Guard(backend=ScriptedBackend(answer))
    verdicts = judge(ITEMS, lambda item: guard, batch=3)
    assert [verdict.label for verdict in verdicts] == ["unsafe" if n == 7 else "safe" for n in range(20)]


def test_items_of_two_guards_go_each_to_its_own() -> None:
    odd, even = (
        Guard(backend=ScriptedBackend(answer)),
        Guard(policy="mlcommons", backend=ScriptedBackend(answer)),
    )
    verdicts = judge(ITEMS, lambda item: odd if int(item.id) % 2 else even, batch=4)
    assert [verdict.policy for verdict in verdicts] == ["mlcommons", "rsafe-18"] * 10


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    store = tmp_path / "verdicts.jsonl"
    guard = Guard(backend=ScriptedBackend("\\boxed{safe}"))

    def stop(done: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(ITEMS, lambda item: guard, store, batch=3, on_progress=stop)
    backend = ScriptedBackend("\\boxed{safe}")
    verdicts = judge(ITEMS, lambda item: Guard(backend=backend), store, batch=3)
    assert len(verdicts) == 20
    assert len(backend.requests) == 14


def test_a_line_that_was_cut_off_is_judged_again(tmp_path: Path) -> None:
    store = tmp_path / "verdicts.jsonl"
    guard = Guard(backend=ScriptedBackend("\\boxed{safe}"))
    judge(ITEMS[:5], lambda item: guard, store)
    store.write_bytes(store.read_bytes()[:-20])
    for expected in (1, 0):
        backend = ScriptedBackend("\\boxed{safe}")
        again = Guard(backend=backend)
        assert len(judge(ITEMS[:5], lambda item, again=again: again, store)) == 5
        assert len(backend.requests) == expected


def test_a_failed_check_is_judged_again_by_the_next_run(tmp_path: Path) -> None:
    store = tmp_path / "verdicts.jsonl"
    failing = Guard(backend=ScriptedBackend(BackendError("down")))
    assert [verdict.label for verdict in judge(ITEMS, lambda item: failing, store)] == [None] * 20
    guard = Guard(backend=ScriptedBackend("\\boxed{safe}"))
    assert [verdict.label for verdict in judge(ITEMS, lambda item: guard, store)] == ["safe"] * 20


def test_other_settings_judge_anew(tmp_path: Path) -> None:
    store = tmp_path / "verdicts.jsonl"
    for policy in ("rsafe-18", "mlcommons"):
        backend = ScriptedBackend("\\boxed{safe}")
        guard = Guard(policy=policy, backend=backend)
        judge(ITEMS, lambda item, guard=guard: guard, store)
        assert len(backend.requests) == 20


def test_weights_of_the_same_file_name_are_told_apart_and_the_same_ones_are_known_again(
    tmp_path: Path,
) -> None:
    pytest.importorskip("xllamacpp")

    def identity(folder: str, adapter: str = "") -> str:
        return engine_identity(Guard(backend=f"llamacpp:{tmp_path / folder / 'guard.gguf'}{adapter}"))

    for folder, weights in (("first", b"GGUF"), ("second", b"GGUF, but trained")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "guard.gguf").write_bytes(weights)
    adapted = [identity(folder, f"#{tmp_path / 'first' / 'guard.gguf'}") for folder in ("first", "second")]
    assert len({*adapted, identity("first"), identity("second")}) == 4
    before = identity("first")
    assert before.startswith("guard-")
    assert identity("first") == before != identity("second")
    (tmp_path / "first" / "guard.gguf").write_bytes(b"GGUF, trained anew")
    assert identity("first") != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello\nworld\n", "line 1"),
        (b"my notes", "name another one"),
        (b'{"id": "1", "task": "prompt"}', "line 1"),
        (b'{"key": "1", "prompt": "mine"}', "line 1"),
        (b'{"id": "1", "task": "pro', "name another one"),
        (b'{"id": "1", "task": "prompt"}\n', "line 1"),
        (b"\xff\xfe{}\n", "line 1"),
    ],
)
def test_a_store_that_holds_something_else_is_named_and_left_as_it_is(
    tmp_path: Path, content: bytes, said: str
) -> None:
    store = tmp_path / "verdicts.jsonl"
    store.write_bytes(content)
    with pytest.raises(DataError, match=said):
        judge(ITEMS, lambda item: Guard(backend=ScriptedBackend()), store)
    assert store.read_bytes() == content


def test_a_run_that_died_at_any_byte_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "verdicts.jsonl"
    guard = Guard(backend=ScriptedBackend("\\boxed{safe}"))
    judge(ITEMS[:2], lambda item: guard, store)
    written = store.read_bytes()
    first = written.index(b"\n") + 1
    for end in range(first, len(written)):
        store.write_bytes(written[:end])
        backend = ScriptedBackend("\\boxed{safe}")
        again = Guard(backend=backend)
        judge(ITEMS[:2], lambda item, again=again: again, store)
        assert len(backend.requests) == (0 if end == len(written) - 1 else 1), end
        assert store.read_bytes().startswith(written[:first])
        assert store.read_bytes().count(b"\n") == 2


def test_servers_with_models_of_the_same_name_are_told_apart() -> None:
    ids = [engine_identity(Guard(backend=f"openai:http://localhost:{port}/v1#m")) for port in (1, 2, 1)]
    assert ids[0] == ids[2] != ids[1]


def test_a_sample_is_the_same_each_time_and_in_order() -> None:
    drawn = sample(ITEMS, 5)
    assert drawn == sample(ITEMS, 5)
    assert [item.id for item in drawn] == sorted((item.id for item in drawn), key=int)
    assert sample(ITEMS, None) == sample(ITEMS, 100) == ITEMS
