"""`rsafe translate` as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import nemoguardrails
import pytest

from rsafe_plugins import Category, Guard, Policy
from rsafe_plugins.cli import main
from rsafe_plugins.commands import common
from rsafe_plugins.testing import ScriptedBackend

ABC = str(Path(nemoguardrails.__file__).parent / "examples" / "bots" / "abc")


def test_policies_go_to_standard_output_and_the_summary_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", ABC]) == 0
    out, err = capsys.readouterr()
    assert [Policy.from_yaml(text).name for text in out.split("\n---\n")] == [
        "abc-input",
        "abc-output",
        "abc-dialog",
    ]
    assert "104 pieces of text" in err
    assert "0 unknown" in err


def test_policies_are_written_into_a_folder_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["translate", ABC, "-o", str(tmp_path / "out"), "--report"]) == 0
    assert len(Policy.load(tmp_path / "out" / "abc-input.yaml").categories) == 10
    assert capsys.readouterr().err.count("no policy:") == 44
    one = tmp_path / "one.yaml"
    assert main(["translate", str(tmp_path / "out" / "abc-input.yaml"), "-o", str(one)]) == 0
    assert Policy.load(one).digest == Policy.load(tmp_path / "out" / "abc-input.yaml").digest
    as_json = tmp_path / "one.json"
    assert main(["translate", str(one), "-o", str(as_json)]) == 0
    assert Policy.load(as_json).digest == Policy.load(one).digest
    before = one.read_text()
    assert main(["translate", str(one), "-o", str(one)]) == 2
    assert "this is what is translated; name another file" in capsys.readouterr().err
    assert one.read_text() == before


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", ABC, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "nemo"
    assert len(data["policies"]) == 3
    assert len(data["report"]) == 104


def test_what_holds_no_policy_has_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "config.yml"
    source.write_text(
        "instructions:\n  - type: general\n    content: You are a bot that talks about the sea.\n"
    )
    assert main(["translate", str(source), "--report"]) == 2
    err = capsys.readouterr().err
    assert "what became of it" in err
    assert "there is no policy in it" in err
    assert main(["translate", str(source), "--json"]) == 2
    data = json.loads(capsys.readouterr().out)
    assert data["policies"] == []
    assert [entry["text"] for entry in data["report"]] == [
        "general",
        "You are a bot that talks about the sea.",
    ]


def test_other_guards_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", ABC, "--to", "nemo", "-o", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / "config.yml").exists()
    assert main(["translate", ABC, "--to", "nemo"]) == 2
    capsys.readouterr()
    assert main(["translate", ABC, "--to", "llama-guard"]) == 0
    assert "<BEGIN UNSAFE CONTENT CATEGORIES>" in capsys.readouterr().out
    source = tmp_path / "names.txt"
    source.write_text("hate\nsexual\n")
    assert main(["translate", str(source), "--to", "mlcommons"]) == 0
    assert "S10" in capsys.readouterr().out


def test_strict_fails_on_what_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", ABC, "--strict"]) == 0
    source = tmp_path / "names.txt"
    source.write_text("hate\nfrobnication\n")
    arguments = ["translate", str(source), "--format", "names"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--strict"]) == 2
    assert "names.txt:2: nobody knows what this is" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "status"), [("?", 0), ("bomb", 1)])
def test_check_judges_the_examples_and_shows_where_the_guard_disagrees(
    word: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(request: object) -> str:
        conversation = str(request).rpartition("<BEGIN CONVERSATION>")[2]
        return r"\boxed{unsafe}" if word in conversation else r"\boxed{safe}"

    def make(**given: object) -> Guard:
        return Guard(given["policy"], backend=ScriptedBackend(reply), reasoning="never")  # type: ignore[arg-type]

    monkeypatch.setattr(common, "make_guard", make)
    assert main(["translate", ABC, "--check", "--json"]) == status
    data = json.loads(capsys.readouterr().out)
    assert data["examples"] == 22
    assert len(data["disagreements"]) == (0 if status == 0 else 21)


def test_a_guard_that_fails_is_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**given: object) -> Guard:
        return Guard(given["policy"], backend=ScriptedBackend("no verdict"), reasoning="never")  # type: ignore[arg-type]

    monkeypatch.setattr(common, "make_guard", make)
    assert main(["translate", ABC, "--check", "--json"]) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["--check", "--report"],
        ["--check", "-o", "x.yaml"],
        ["--check", "--to", "nemo"],
        ["--backend", "embedded"],
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str]) -> None:
    assert main(["translate", ABC, *options]) == 2


def test_check_keeps_the_answers_from_the_guard_and_shows_each_disagreement_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"How do I {'really ' * 30}steal?"
    source = tmp_path / "shop.yaml"
    category = Category(id="C1", name="Theft", examples=(asked,), allowed_examples=("How do I pay?",))
    Policy(name="shop", categories=(category,)).save(source)
    backend = ScriptedBackend(r"\boxed{safe}")

    def make(**given: object) -> Guard:
        return Guard(given["policy"], backend=backend, reasoning="never")  # type: ignore[arg-type]

    monkeypatch.setattr(common, "make_guard", make)
    assert main(["translate", str(source), "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"shop C1: expected unsafe, the guard says safe: {asked}",
        "2 examples, the guard disagrees on 1.",
    ]
    assert [request.messages[0].content.count("How do I") for request in backend.requests] == [1, 1]


def test_what_cannot_be_translated_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_names_of_files_stay_in_the_folder(tmp_path: Path) -> None:
    prompt = "  - {task: self_check_input $variant=VARIANT, content: must not WHAT}\n"
    text = "prompts:\n" + "".join(
        prompt.replace("VARIANT", variant).replace("WHAT", what)
        for variant, what in (("../../x", "swear"), ("..-..-x", "lie"))
    )
    source = tmp_path / "config.yml"
    source.write_text(text)
    assert main(["translate", str(source), "-o", str(tmp_path / "a" / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "config-input-..-..-x-2.yaml",
        "config-input-..-..-x.yaml",
    ]


def test_check_without_examples_checks_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "shop.yaml"
    Policy(name="shop", categories=(Category(id="C1", name="Theft"),)).save(source)
    assert main(["translate", str(source), "--check"]) == 2
    assert "there are none" in capsys.readouterr().err
