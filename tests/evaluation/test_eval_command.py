import json
from pathlib import Path
from typing import Any

import pytest

from rsafe_plugins import Guard
from rsafe_plugins.backends import Request
from rsafe_plugins.cli import main
from rsafe_plugins.commands import common
from rsafe_plugins.testing import ScriptedBackend


def probability(request: Request) -> dict[str, float]:
    unsafe = 0.9 if "bad" in request.messages[0].content else 0.1
    return {"safe": 1 - unsafe, "unsafe": unsafe}


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**settings: Any) -> Guard:
        return Guard(**{**settings, "backend": ScriptedBackend("", candidates=probability)})

    monkeypatch.setattr(common, "make_guard", make)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    rows = [
        {"id": "1", "task": "prompt", "prompt": "bad", "label": "unsafe"},
        {"id": "2", "task": "prompt", "prompt": "good", "label": "safe"},
        {"id": "3", "task": "prompt", "prompt": "bad but fine", "label": "safe"},
        {"id": "4", "task": "document", "document": "good", "label": "unsafe"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_is_one_object_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(data), "--reasoning", "never", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert (figures["file"], figures["items"], figures["failures"]) == ("set.jsonl", 4, 0)
    assert (figures["precision"], figures["recall"], figures["false_positive_rate"]) == (0.5, 0.5, 0.5)


def test_the_table_names_the_set_and_its_figures(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(data), "--reasoning", "never"]) == 0
    printed = capsys.readouterr().out
    assert "set" in printed
    assert "0.500" in printed


def test_verdicts_are_kept_for_the_next_run(data: Path, tmp_path: Path) -> None:
    store = tmp_path / "kept" / "verdicts.jsonl"
    assert main(["eval", str(data), "--verdicts", str(store), "--json"]) == 0
    first = store.read_text()
    assert len(first.splitlines()) == 4
    assert main(["eval", str(data), "--verdicts", str(store), "--json"]) == 0
    assert store.read_text() == first


def test_fitting_writes_where_the_guard_draws_its_lines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fitted.yaml"
    assert main(["eval", str(data), "--fit", str(file), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    fitted = json.loads(line)
    assert (fitted["policy"], fitted["items"]) == ("rsafe-18", 3)
    guard = Guard(backend=ScriptedBackend("", candidates=probability), threshold=file)
    assert guard.operating_point.threshold == fitted["threshold"]
    assert 0.1 < fitted["threshold"] < 0.9


def test_fitting_without_thoughts_judges_once_and_never_thinks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, store = tmp_path / "fitted.yaml", tmp_path / "verdicts.jsonl"
    command = [
        "eval",
        str(data),
        "--fit",
        str(file),
        "--reasoning",
        "never",
        "--verdicts",
        str(store),
        "--json",
    ]
    assert main(command) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["band"] == [fitted["threshold"]] * 2
    assert len(store.read_text().splitlines()) == 4
    assert main(["eval", str(data), "--fit", str(file), "--reasoning", "always"]) == 2
    assert "leave --reasoning out" in capsys.readouterr().err


def test_fitting_needs_both_labels(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(data.read_text().splitlines()[0] + "\n")
    assert main(["eval", str(data), "--fit", str(tmp_path / "fitted.yaml")]) == 2
    assert "safe and unsafe items" in capsys.readouterr().err
    assert not (tmp_path / "fitted.yaml").exists()


def test_a_bad_file_is_one_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
