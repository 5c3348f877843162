import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsafe_plugins.alignment.recipe import CHECKPOINTS, WarmStartSettings, load_recipe
from rsafe_plugins.cli import main
from rsafe_plugins.commands import align
from rsafe_plugins.evaluation.items import read_items

pytestmark = pytest.mark.align


def write(path: Path, labels: tuple[str, ...] = ("safe", "unsafe")) -> Path:
    rows = [
        {"id": str(n), "task": "prompt", "prompt": f"text {n}", "label": labels[n % len(labels)]}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_leaves_an_adapter_for_peft_and_for_llama_cpp_and_says_what_was_done(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    command = ["align", "--stage", "warm-start", f"{data}@20", "--base", str(tiny_base), "--out", str(out)]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch: 4\npolicies: {whole: 1}\n")
    command += ["--recipe", str(recipe), "--set", "thoughts=0", "--set", "items=16", "--batch", "8"]
    status = main([*command, "--held-out", "4", "--json"])
    printed = capsys.readouterr().out
    assert status == 0
    report = json.loads(printed)
    assert report == json.loads((out / "run.json").read_text())
    assert report["items"] == 16
    changed = {"policies.whole": 1, "policies.names": 0, "policies.reworded": 0, "thoughts": 0, "items": 16}
    expected = {**changed, "batch": 8, "base": str(tiny_base)}
    assert report["settings"] == load_recipe(WarmStartSettings, None, expected).model_dump(mode="json")
    assert Path(report["gguf"]).read_bytes()[:4] == b"GGUF"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert len((out / "held-out.jsonl").read_text().splitlines()) == 4
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["seen"] == 16


def test_harmless_prompts_are_judged_as_documents_too(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl")
    command = [
        "align",
        "--stage",
        "warm-start",
        f"{data}@8",
        "--base",
        str(tiny_base),
        "--held-out",
        "0",
        "--json",
    ]
    asked = {}
    for documents in (0, 3):
        out = tmp_path / f"run{documents}"
        assert main([*command, "--out", str(out), "--set", f"prompts_as_documents={documents}"]) == 0
        asked[documents] = json.loads(capsys.readouterr().out)["items"]
    assert asked == {0: 8, 3: 11}


def test_what_is_held_out_has_such_documents_too(tiny_base: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    command = ["align", "--stage", "warm-start", f"{data}@8", "--base", str(tiny_base), "--out", str(out)]
    assert main([*command, "--held-out", "4", "--set", "prompts_as_documents=9", "--set", "items=8"]) == 0
    held_out = read_items(out / "held-out.jsonl")
    harmless = {one.prompt for one in held_out[:4] if not one.unsafe}
    assert harmless
    assert {one.document for one in held_out[4:]} == harmless


def test_instructions_are_hidden_in_documents_of_both_parts(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, documents = write(tmp_path / "data.jsonl"), tmp_path / "run", tmp_path / "documents.jsonl"
    rows = [
        {"id": f"order-{n}", "task": "document", "document": f"Now obey {n}.", "label": "unsafe"}
        for n in range(20)
    ]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["align", "--stage", "warm-start", str(data), str(documents), "--base", str(tiny_base)]
    command += ["--out", str(out), "--held-out", "4", "--set", "injected_documents=10", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 36 + 18 + 10
    held_out = read_items(out / "held-out.jsonl")
    assert len(held_out) == 4 + 2, "too few harmless prompts are held out to hide anything among them"


def test_responses_are_crossed_in_both_parts(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    rows: list[dict[str, str]] = []
    for n in range(40):
        label = ("safe", "unsafe")[n % 2]
        text = f"{label} words in a row, more than ten of them, number {n} of 40"
        rows.append({"id": f"p{n}", "task": "prompt", "prompt": text, "label": label})
        rows.append({"id": f"r{n}", "task": "response", "prompt": f"{n}?", "response": text, "label": label})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["align", "--stage", "warm-start", str(data), "--base", str(tiny_base), "--out", str(out)]
    command += ["--held-out", "8", "--set", "crossed_responses=10", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 80 - 8 + 10
    made = read_items(out / "held-out.jsonl")[8:]
    assert made
    assert all(one.task == "response" and not one.prompt.endswith("?") for one in made)


def test_a_start_that_is_refused_leaves_what_the_run_that_died_held_out(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    command = ["align", "--stage", "warm-start", f"{data}@8", "--base", str(tiny_base), "--out", str(out)]
    command += ["--held-out", "4"]
    with monkeypatch.context() as patched:
        patched.setattr(align, "_versions", lambda: 1 / 0)
        assert main(command) == 3
    held_out = (out / "held-out.jsonl").read_text()
    assert main([*command, "--seed", "1"]) == 3
    assert "with another seed" in capsys.readouterr().err
    assert (out / "held-out.jsonl").read_text() == held_out


def test_base_and_adapter_can_be_written_as_one_folder(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    command = ["align", f"{data}@8", "--base", str(tiny_base), "--out", str(out), "--merged"]
    assert main([*command, "--stage", "warm-start", "--batch", "8", "--held-out", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    merged = AutoModelForCausalLM.from_pretrained(report["merged"])
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert main([*command, "--stage", "grpo", "--full"]) == 2
    assert "no adapter to merge" in capsys.readouterr().err


def test_an_adapter_that_llama_cpp_has_no_form_for_is_kept(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsafe_plugins.alignment.export._REORDERED", {})
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    command = ["align", "--stage", "warm-start", f"{data}@8", "--base", str(tiny_base), "--out", str(out)]
    assert main([*command, "--batch", "8", "--held-out", "0"]) == 0
    printed = capsys.readouterr()
    assert "No file for llama.cpp was written" in printed.err
    assert str(out / "adapter") in printed.out.replace("\n", "")
    assert (out / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "says"),
    [("missing.jsonl", "missing.jsonl"), ("data.jsonl@x", "FILE@COUNT"), ("safe.jsonl", "are safe")],
)
def test_data_that_cannot_be_used_is_one_sentence_and_status_2(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, says: str
) -> None:
    write(tmp_path / "data.jsonl")
    write(tmp_path / "safe.jsonl", ("safe",))
    command = ["align", "--stage", "warm-start", str(tmp_path / file), "--base", str(tiny_base)]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def command_of(base: Path, out: Path, *more: str) -> list[str]:
    return ["align", "--stage", "warm-start", "--base", str(base), "--out", str(out), "--batch", "8", *more]


def test_a_run_that_ended_is_not_overwritten(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    command = command_of(tiny_base, out, f"{data}@8")
    assert main(command) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not (out / "checkpoint.pt").exists()
    assert main([*command, "--seed", "7"]) == 2
    assert "another one there would take its place" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("stage", "other"), [("warm-start", "grpo"), ("grpo", "warm-start")])
def test_a_folder_in_which_the_other_stage_died_is_refused(
    stage: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl")
    checkpoint = tmp_path / CHECKPOINTS[other].replace("*", "3")
    checkpoint.mkdir(parents=True)
    assert main(["align", "--stage", stage, str(data), "--out", str(tmp_path)]) == 2
    assert f"A run of the stage {other} died in" in capsys.readouterr().err.replace("\n", " ")


def test_what_was_trained_is_not_lost_when_it_cannot_be_written(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    out.mkdir()
    (out / "adapter").write_text("in the way")
    assert main(command_of(tiny_base, out, str(data))) == 3
    error = capsys.readouterr().err
    assert "can't be written" in error
    assert "Traceback" not in error
    assert (out / "checkpoint.pt").exists()
    log = (out / "log.jsonl").read_text()
    (out / "adapter").unlink()
    assert main(command_of(tiny_base, out, str(data))) == 0
    assert (out / "log.jsonl").read_text() == log, "nothing is computed again"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert not (out / "checkpoint.pt").exists()


def test_a_run_that_died_does_not_go_on_with_another_adapter_of_the_same_path(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "data.jsonl")
    for name, seed in (("one", "1"), ("two", "2")):
        assert main(command_of(tiny_base, tmp_path / name, f"{data}@16", "--seed", seed)) == 0
    out = tmp_path / "run"
    on = [str(data), "--adapter", str(tmp_path / "one" / "adapter"), "--set", "distill.prompts=0.5"]
    out.mkdir()
    (out / "adapter").write_text("in the way, so that the checkpoint stays")
    assert main(command_of(tiny_base, out, *on)) == 3
    (tmp_path / "two" / "adapter" / "adapter_model.safetensors").replace(
        tmp_path / "one" / "adapter" / "adapter_model.safetensors"
    )
    assert main(command_of(tiny_base, out, *on)) == 3
    assert "with another from_adapter_sha256" in capsys.readouterr().err


def test_no_time_and_a_checkpoint_that_is_none_are_one_sentence(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    assert main(command_of(tiny_base, out, str(data), "--minutes", "0.0000001")) == 2
    assert "time was up before the first step" in capsys.readouterr().err
    for content in (b"", b"garbage"):
        (out / "checkpoint.pt").write_bytes(content)
        assert main(command_of(tiny_base, out, str(data))) == 3
        error = capsys.readouterr().err
        assert "remove it to start again" in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "value", ["learning_rate=.inf", "minutes=.inf", "seed=-1", "seed=99999999999999999999"]
)
def test_a_number_that_is_none_or_out_of_range_is_refused(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    data = write(tmp_path / "data.jsonl")
    assert main(command_of(tiny_base, tmp_path / "run", str(data), "--set", value)) == 2
    assert value.partition("=")[0] in capsys.readouterr().err


def test_two_processes_train_and_leave_one_adapter(tiny_base: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.jsonl"), tmp_path / "run"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "rsafe_plugins.cli",
    ]
    done = subprocess.run(
        [*launch, *command_of(tiny_base, out, str(data), "--json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((out / "run.json").read_text())["machine"].endswith("2 processes")
    assert (out / "adapter" / "adapter_model.safetensors").exists()
