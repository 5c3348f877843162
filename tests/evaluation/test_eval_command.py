import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.chat_server import ChatServer

from rsafe_plugins import Guard
from rsafe_plugins.backends import Request
from rsafe_plugins.cli import main
from rsafe_plugins.commands import common
from rsafe_plugins.errors import BackendError
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


def test_a_threshold_of_categories_is_written_beside_what_is_fitted_and_changes_nothing_of_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(request: Request) -> dict[str, float]:
        asked_about_one = "Category: " in request.messages[-1].content
        return {"safe": 0.9, "unsafe": 0.1} if asked_about_one else probability(request)

    backend = ScriptedBackend("", candidates=candidates)
    monkeypatch.setattr(common, "make_guard", lambda **given: Guard(**{**given, "backend": backend}))
    points = []
    for options in ([], ["--category-threshold", "0.3"]):
        file = tmp_path / f"{len(options)}.yaml"
        assert main(["eval", str(data), "--reasoning", "never", "--fit", str(file), *options]) == 0
        points.append(Guard(backend=backend, threshold=file).operating_point)
    assert points[1] == points[0].model_copy(update={"category_threshold": 0.3})


def test_fitting_needs_both_labels(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(data.read_text().splitlines()[0] + "\n")
    assert main(["eval", str(data), "--fit", str(tmp_path / "fitted.yaml")]) == 2
    assert "safe and unsafe items" in capsys.readouterr().err
    assert not (tmp_path / "fitted.yaml").exists()


def test_a_bad_file_is_one_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_has_the_intervals_and_every_part(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(data), "--reasoning", "never", "--json"]) == 0
    (found,) = lines(capsys)
    assert (found["guard"], found["reasoning"], found["model"]) == ("base", "never", "scripted")
    assert found["thresholds"] == {"rsafe-18": 0.5, "prompt-injection": 0.5}
    assert found["intervals"]["recall"] == [0, 1]
    assert {way: [part["name"] for part in parts] for way, parts in found["breakdown"].items()} == {
        "task": ["document", "prompt"],
        "category": ["(none)"],
        "length": ["up to 100 characters"],
        "mode": ["bare verdict"],
    }


def test_guards_are_compared_on_the_same_items(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(data), "--reasoning", "never", "--compare", "threshold=0.95", "--json"]
    assert main(command) == 0
    base, other, comparison = lines(capsys)
    assert (base["recall"], other["recall"]) == (0.5, 0)
    assert other["guard"] == "threshold=0.95"
    assert other["thresholds"]["rsafe-18"] == 0.95
    # With the higher threshold the unsafe prompt is missed and the false alarm is gone.
    assert (comparison["guard"], comparison["compared_with"]) == ("threshold=0.95", "base")
    assert (comparison["only_first"], comparison["only_other"], comparison["p_value"]) == (1, 1, 1)
    assert comparison["changes"]["recall"][0] == -0.5


def test_compared_guards_take_every_setting_by_its_key(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    made: list[dict[str, Any]] = []

    def make(**settings: Any) -> Guard:
        made.append(settings)
        return Guard(backend=ScriptedBackend("", candidates=probability), policy=settings["policy"])

    monkeypatch.setattr(common, "make_guard", make)
    variant = "backend=openai:http://a/v1,http://b/v1#m,band=[0.2, 0.6],document_policy=mlcommons,timeout=5"
    assert main(["eval", str(data), "--threshold", "0.4", "--compare", variant]) == 0
    base, changed = made[0], made[2]
    assert base["threshold"] == changed["threshold"] == 0.4
    assert base["backend"] is None
    assert changed["backend"] == "openai:http://a/v1,http://b/v1#m"
    assert (changed["band"], changed["timeout"]) == ([0.2, 0.6], 5)
    assert [one["policy"] for one in made] == [None, "prompt-injection", None, "mlcommons"]


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("always", "expected KEY=VALUE, not 'always'"),
        ("reasonning=always", "did you mean 'reasoning'"),
        ("on_error=allow", "there is no setting 'on_error'"),
        ("threshold=2", "2.0 is not in the range"),
    ],
)
def test_what_cannot_be_compared_is_said(
    data: Path, capsys: pytest.CaptureFixture[str], variant: str, says: str
) -> None:
    assert main(["eval", str(data), "--compare", variant]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_tables_of_a_comparison_and_of_parts(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    command = ["eval", str(data), "--reasoning", "never", "--compare", "threshold=0.95", "--by", "task"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Compared with base" in printed
    assert "-0.500" in printed
    assert "document" in printed


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long_name = data.rename(data.with_name("openai_moderation_of_a_long_name.jsonl"))
    command = [
        "eval",
        str(long_name),
        "--reasoning",
        "never",
        "--compare",
        "threshold=0.95",
        "--by",
        "length",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    assert "…" not in printed
    assert "..." not in printed


def test_sets_of_the_same_name_are_told_apart(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / data.name
    other.parent.mkdir()
    other.write_text(data.read_text())
    assert main(["eval", str(data), str(other), str(data), "--json"]) == 0
    assert [line["file"] for line in lines(capsys)] == [str(data), str(other)]


def test_a_public_format_is_judged_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "xstest_prompts.csv"
    path.write_text("id,prompt,type\n1,bad,contrast_homonyms\n2,good,homonyms\n")
    assert main(["eval", f"xstest:{path}", "--reasoning", "never", "--json"]) == 0
    (found,) = lines(capsys)
    assert (found["file"], found["f1"]) == ("xstest:xstest_prompts.csv", 1)


def test_the_same_verdicts_make_the_same_json_and_the_same_report(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, report = tmp_path / "verdicts.jsonl", tmp_path / "reports" / "report.html"
    outputs = []
    for _ in range(2):
        command = ["eval", str(data), "--verdicts", str(store), "--report", str(report), "--json"]
        assert main(command) == 0
        outputs.append((capsys.readouterr().out, report.read_bytes()))
    assert outputs[0] == outputs[1]


def test_a_report_needs_no_fit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(data), "--fit", str(tmp_path / "f.yaml"), "--report", str(tmp_path / "r.html")]
    assert main(command) == 2
    assert "leave out --fit" in capsys.readouterr().err


def test_all_checks_failed_is_status_3(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(**settings: Any) -> Guard:
        return Guard(backend=ScriptedBackend("no verdict"), policy=settings["policy"], reasoning="always")

    monkeypatch.setattr(common, "make_guard", make)
    assert main(["eval", str(data), "--json"]) == 3
    (found,) = lines(capsys)
    assert (found["failures"], found["recall"], found["false_positive_rate"]) == (4, 0, 1)


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_was_ended_goes_on_from_its_verdicts(
    tmp_path: Path, sign: signal.Signals, status: int
) -> None:
    rows = [{"id": str(n), "task": "prompt", "prompt": f"text {n}.", "label": "safe"} for n in range(40)]
    data, store = tmp_path / "set.jsonl", tmp_path / "verdicts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hangs, go_on = threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        if "text 30." in body["messages"][-1]["content"] and not go_on.is_set():
            hangs.set()
            go_on.wait(timeout=120)
        return "<think>Fine.</think>\\boxed{safe}"

    with ChatServer(answer) as server:
        command = [sys.executable, "-m", "rsafe_plugins.cli", "eval", str(data), "--verdicts", str(store)]
        command += ["--backend", f"openai:{server.url}#m", "--reasoning", "always", "--json"]
        # What a shell starts in the background ignores Ctrl-C, and hands that on.
        running = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert hangs.wait(timeout=120)
        os.kill(running.pid, sign)
        _, said = running.communicate(timeout=120)
        assert running.returncode == status
        assert ("the same command goes on from here" in said) == (sign == signal.SIGINT)
        assert len(store.read_text().splitlines()) == 16
        go_on.set()
        before = len(server.bodies)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        asked = " ".join(body["messages"][-1]["content"] for body in server.bodies[before:])
    found = json.loads(done.stdout)
    assert (found["items"], found["failures"], found["false_positive_rate"]) == (40, 0, 0)
    assert [n for n in range(40) if f"text {n}." in asked] == list(range(16, 40))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fit", "f.yaml", "--adherence", "mlcommons"], "leave one of them out"),
        (["--unsafe-share", "0.5"], "--unsafe-share is for --fit"),
        (["--report", "set.jsonl"], "--report would write to set.jsonl"),
        (["--verdicts", "set.jsonl"], "--verdicts would write to set.jsonl"),
        (["--verdicts", "v", "--report", "v"], "--report would write to v"),
        (["--fit", "bad.yaml"], "can't be read"),
    ],
)
def test_what_cannot_go_together_is_said_before_anything_is_judged(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(data.parent)
    before = data.read_bytes()
    Path("bad.yaml").write_text("a: [")

    def unused(**settings: Any) -> Guard:
        raise AssertionError("nothing is to be judged")

    monkeypatch.setattr(common, "make_guard", unused)
    assert main(["eval", data.name, *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert data.read_bytes() == before


@pytest.mark.parametrize("options", [[], ["--fit", "f.yaml"]], ids=["eval", "fit"])
def test_why_all_checks_failed_is_said(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    def make(**settings: Any) -> Guard:
        return Guard(backend=ScriptedBackend(BackendError("The engine is down.")), policy=settings["policy"])

    monkeypatch.chdir(data.parent)
    monkeypatch.setattr(common, "make_guard", make)
    assert main(["eval", str(data), *options]) == 3
    assert "4 of 4 checks failed: The engine is down." in capsys.readouterr().err


def test_a_number_without_end_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "big.jsonl"
    data.write_text('{"id": ' + "1" * 5000 + "}")
    assert main(["eval", str(data)]) == 2
    assert "line 1: expected a JSON object" in capsys.readouterr().err


def test_a_model_is_fitted_into_the_file_that_the_settings_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = tmp_path / "fitted.yaml"
    fitted.write_text("another: {rsafe-18: {threshold: 0.2}}\n")
    monkeypatch.setenv("RSAFE_THRESHOLD", str(fitted))
    assert main(["eval", str(data), "--fit", str(fitted), "--reasoning", "never"]) == 0
    assert main(["eval", str(data), "--reasoning", "never"]) == 0
