import json
from pathlib import Path

import pytest

from rsafe_plugins.alignment.data import TrainingFile, read_training_data
from rsafe_plugins.errors import DataError


def write(path: Path, count: int, labels: tuple[str, ...] = ("safe", "unsafe")) -> Path:
    rows = [
        {
            "id": f"{path.stem}-{n}",
            "task": "prompt",
            "prompt": f"{path.stem} {n}",
            "label": labels[n % len(labels)],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_gives_its_share_and_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    files = [
        TrainingFile(write(tmp_path / "a.jsonl", 100), 50),
        TrainingFile(write(tmp_path / "b.jsonl", 20)),
    ]
    data = read_training_data(files, held_out=5, seed=0)
    assert (len(data.items), len(data.held_out), len(data.unused)) == (50 + 18, 5 + 2, 45)
    ids = [item.id for item in (*data.items, *data.held_out, *data.unused)]
    assert len(ids) == len(set(ids)) == 120


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    file = TrainingFile(write(tmp_path / "a.jsonl", 100), 10)
    first, again, other = (read_training_data([file], 5, seed).items for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("text", ["a.jsonl@", "a.jsonl@0", "a.jsonl@-1", "a.jsonl@many"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="FILE@COUNT"):
        TrainingFile.parse(text)


def test_a_path_with_and_without_a_count_is_read() -> None:
    assert TrainingFile.parse("x/a.jsonl") == TrainingFile(Path("x/a.jsonl"))
    assert TrainingFile.parse("x/a.jsonl@7") == TrainingFile(Path("x/a.jsonl"), 7)


def test_data_of_one_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 18 are safe"):
        read_training_data([TrainingFile(write(tmp_path / "a.jsonl", 20, ("safe",)))], 5, 0)


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = TrainingFile(write(tmp_path / "a.jsonl", 20))
    with pytest.raises(DataError, match="more than once"):
        read_training_data([file, file], 5, 0)


def test_a_text_with_both_labels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    twice = {"id": "again", "task": "prompt", "prompt": "a 3", "label": "safe"}
    path.write_text(path.read_text() + json.dumps(twice) + "\n")
    with pytest.raises(DataError, match="are the same text, one labelled"):
        read_training_data([TrainingFile(path)], 2, 0)


def rows_of(path: Path, *rows: dict[str, str]) -> TrainingFile:
    path.write_text(
        "".join(json.dumps({"id": f"{path.stem}-{n}", **row}) + "\n" for n, row in enumerate(rows))
    )
    return TrainingFile(path)


def test_a_text_that_is_held_out_is_trained_on_nowhere_else(tmp_path: Path) -> None:
    rows = [{"task": "prompt", "prompt": f"p {n}", "label": ("safe", "unsafe")[n % 2]} for n in range(40)]
    files = [rows_of(tmp_path / "a.jsonl", *rows), rows_of(tmp_path / "b.jsonl", *rows)]
    data = read_training_data(files, 4, 0)
    held_out = {item.prompt for item in data.held_out}
    assert held_out
    assert held_out.isdisjoint(item.prompt for item in (*data.items, *data.unused))


def test_no_response_is_held_out_whose_prompt_is_trained_on(tmp_path: Path) -> None:
    labels = ("safe", "unsafe")
    rows = [
        {"task": "response", "prompt": f"p {n % 25}", "response": f"r {n}", "label": labels[n % 2]}
        for n in range(200)
    ]
    alone = [{"task": "response", "response": f"alone {n}", "label": labels[n % 2]} for n in range(20)]
    files = [rows_of(tmp_path / "a.jsonl", *rows), rows_of(tmp_path / "b.jsonl", *alone)]
    data = read_training_data(files, 20, 0)
    held_out = [item.prompt for item in data.held_out if item.prompt]
    assert len(held_out) == 20
    assert len(set(held_out)) == 10
    assert set(held_out).isdisjoint(item.prompt for item in (*data.items, *data.unused))
    assert sum(bool(item.prompt) for item in data.items) == 200 - 10 * 8
    assert sum(not item.prompt for item in data.items) == 18, "those without a prompt have none in common"


def test_fields_that_are_not_judged_do_not_make_one_text_two(tmp_path: Path) -> None:
    same = {"task": "prompt", "prompt": "same"}
    file = rows_of(
        tmp_path / "a.jsonl",
        {**same, "response": "a", "label": "safe"},
        {**same, "response": "b", "label": "unsafe"},
    )
    with pytest.raises(DataError, match="the same text"):
        read_training_data([file], 0, 0)


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    file = rows_of(
        tmp_path / "a.jsonl",
        {"task": "prompt", "prompt": "x \ud83d", "label": "safe"},
        {"task": "prompt", "prompt": "y", "label": "unsafe"},
    )
    with pytest.raises(DataError, match="a-0 holds half of a surrogate pair"):
        read_training_data([file], 0, 0)


def test_a_path_with_an_at_sign_that_is_there_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "runs@home").mkdir()
    path = write(tmp_path / "runs@home" / "data.jsonl", 4)
    assert TrainingFile.parse(str(path)) == TrainingFile(path)
