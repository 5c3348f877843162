import json
from pathlib import Path

import pytest

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import read_items

RIGHT = {"id": "1", "task": "prompt", "prompt": "hi", "label": "safe"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_items_become_contents_of_their_kind(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        RIGHT,
        {
            "id": "2",
            "task": "response",
            "prompt": "q",
            "response": "a",
            "label": "unsafe",
            "categories": ["Hate"],
        },
        "",
        {"id": "3", "task": "document", "document": "d", "label": "safe", "source": "ignored"},
    )
    items = read_items(path)
    assert [item.content().kind for item in items] == ["prompt", "response", "document"]
    assert [item.content().text for item in items] == ["hi", "a", "d"]
    assert items[1].content().context == "q"
    assert items[1].unsafe
    assert items[1].categories == ("Hate",)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[]", "line 2"),
        ({**RIGHT, "label": "maybe"}, "line 2: label"),
        ({**RIGHT, "task": "poem"}, "line 2: task"),
        ({**RIGHT, "prompt": ""}, "'prompt' must hold text"),
        ({"id": "1", "task": "prompt", "prompt": "hi"}, "line 2: label"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_items(write(tmp_path / "a.jsonl", RIGHT, row))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path, write(tmp_path / "empty.jsonl")):
        with pytest.raises(DataError, match=path.name):
            read_items(path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_items(tmp_path / "latin.jsonl")


def test_cells_of_a_table_may_be_empty_and_ids_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "null.jsonl",
        {"id": 1, "task": "prompt", "prompt": "Hi", "response": None, "label": "safe", "categories": None},
        {
            "id": "2",
            "task": "prompt",
            "prompt": "Hi",
            "label": "unsafe",
            "categories": "theft, robbery; fraud",
        },
    )
    first, second = read_items(path)
    assert (first.id, first.response, first.categories) == ("1", "", ())
    assert second.categories == ("theft, robbery", "fraud")


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    row = {"id": "1", "task": "prompt", "prompt": "Hi", "label": "safe"}
    assert len(read_items(write(tmp_path / "lines.json", row, {**row, "id": "2"}))) == 2
