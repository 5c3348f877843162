import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.formats import FORMATS, read_set
from rsafe_plugins.evaluation.items import LabelledItem

Rows = list[dict[str, Any]]


def json_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def as_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows), "utf-8")


def as_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def packed(path: Path, rows: Rows) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes((gzip if path.suffix == ".gz" else lzma).compress(text))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": json_lines,
    ".json": as_json,
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".gz": packed,
    ".xz": packed,
}


def read(folder: Path, name: str, file: str, rows: Rows) -> list[LabelledItem]:
    path = folder / file
    WRITERS[path.suffix](path, rows)
    return list(read_set(f"{name}:{path}").items)


def brief(items: list[LabelledItem]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(item.task, item.content().text, item.label, item.categories) for item in items]


def test_openai_moderation_counts_the_codes_it_has(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a threat", "S": 0, "H": 0, "V": 1, "HR": 1, "SH": 0, "S3": 0, "H2": 0, "V2": 0},
        {"prompt": "a greeting", "S": 0, "H": 0},
    ]
    assert brief(read(tmp_path, "openai-moderation", "samples-1680.jsonl.gz", rows)) == [
        ("prompt", "a threat", "unsafe", ("V", "HR")),
        ("prompt", "a greeting", "safe", ()),
    ]


@pytest.mark.parametrize("file", ["test.csv", "test.parquet"])
def test_toxicchat_keeps_what_people_annotated(tmp_path: Path, file: str) -> None:
    rows = [
        {"conv_id": "a", "user_input": "rude", "human_annotation": True, "toxicity": 1, "jailbreaking": 0},
        {"conv_id": "b", "user_input": "escape", "human_annotation": True, "toxicity": 1, "jailbreaking": 1},
        {"conv_id": "c", "user_input": "kind", "human_annotation": True, "toxicity": 0, "jailbreaking": 0},
        {"conv_id": "d", "user_input": "unseen", "human_annotation": False, "toxicity": 0, "jailbreaking": 0},
    ]
    assert brief(read(tmp_path, "toxicchat", file, rows)) == [
        ("prompt", "rude", "unsafe", ()),
        ("prompt", "escape", "unsafe", ("jailbreaking",)),
        ("prompt", "kind", "safe", ()),
    ]


def test_wildguard_has_a_prompt_and_a_response_a_row_and_leaves_out_what_has_no_label(tmp_path: Path) -> None:
    labels = {
        "prompt_harm_label": "harmful",
        "response_harm_label": "unharmful",
        "subcategory": "cyberattack",
    }
    rows = [
        {"prompt": "how to hack", "response": "I won't say", **labels},
        {
            "prompt": "hello",
            "response": None,
            "prompt_harm_label": "unharmful",
            "response_harm_label": None,
            "subcategory": "benign",
        },
        {
            "prompt": "unclear",
            "response": "bad answer",
            "prompt_harm_label": None,
            "response_harm_label": "harmful",
            "subcategory": "others",
        },
    ]
    items = read(tmp_path, "wildguard", "wildguard_test.parquet", rows)
    assert brief(items) == [
        ("prompt", "how to hack", "unsafe", ("cyberattack",)),
        ("response", "I won't say", "safe", ("cyberattack",)),
        ("prompt", "hello", "safe", ("benign",)),
        ("response", "bad answer", "unsafe", ("others",)),
    ]
    assert items[1].content().context == "how to hack"
    assert [item.id for item in items] == ["1", "1.1", "2", "3"]


@pytest.mark.parametrize("file", ["test.jsonl.xz", "test.parquet"])
def test_beavertails_names_every_category_that_is_true(tmp_path: Path, file: str) -> None:
    kinds = ("animal_abuse", "self_harm", "privacy_violation")
    rows = [
        {
            "prompt": "q",
            "response": "a",
            "category": dict.fromkeys(kinds, False) | {"self_harm": True, "animal_abuse": True},
            "is_safe": False,
        },
        {"prompt": "q", "response": "b", "category": dict.fromkeys(kinds, False), "is_safe": True},
    ]
    assert brief(read(tmp_path, "beavertails", file, rows)) == [
        ("response", "a", "unsafe", ("animal_abuse", "self_harm")),
        ("response", "b", "safe", ()),
    ]


def test_saferlhf_has_two_responses_a_row(tmp_path: Path) -> None:
    row = {
        "prompt": "q",
        "response_0": "fine",
        "response_1": "awful",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "response_0_harm_category": {"Animal Abuse": False, "Drugs": False},
        "response_1_harm_category": {"Animal Abuse": False, "Drugs": True},
    }
    assert brief(read(tmp_path, "saferlhf", "test.jsonl", [row])) == [
        ("response", "fine", "safe", ()),
        ("response", "awful", "unsafe", ("Drugs",)),
    ]


def test_xstest_goes_by_its_labels_and_without_them_by_the_contrasts(tmp_path: Path) -> None:
    expected = [
        ("prompt", "kill a process", "safe", ("homonyms",)),
        ("prompt", "kill a person", "unsafe", ("contrast_homonyms",)),
    ]
    first = [
        {"id": "v1-1", "type": "homonyms", "prompt": "kill a process"},
        {"id": "v1-2", "type": "contrast_homonyms", "prompt": "kill a person"},
    ]
    second = [{**row, "label": label} for row, label in zip(first, ("safe", "unsafe"), strict=True)]
    for rows in (first, second):
        assert brief(read(tmp_path, "xstest", "xstest_prompts.csv", rows)) == expected


def test_aegis_leaves_out_redacted_prompts_and_splits_its_categories(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "bad",
            "response": "worse",
            "prompt_label": "unsafe",
            "response_label": "unsafe",
            "violated_categories": "Violence, Threat",
        },
        {
            "prompt": "good",
            "response": None,
            "prompt_label": "safe",
            "response_label": None,
            "violated_categories": "",
        },
        {
            "prompt": "REDACTED",
            "response": "left out",
            "prompt_label": "unsafe",
            "response_label": "safe",
            "violated_categories": "Profanity",
        },
    ]
    assert brief(read(tmp_path, "aegis", "test.json", rows)) == [
        ("prompt", "bad", "unsafe", ("Violence", "Threat")),
        ("response", "worse", "unsafe", ("Violence", "Threat")),
        ("prompt", "good", "safe", ()),
    ]


def test_aegis_1_takes_the_votes_on_what_users_wrote(tmp_path: Path) -> None:
    rows = [
        {
            "text": "mostly safe",
            "text_type": "user_message",
            "labels_0": "Safe",
            "labels_1": "Safe",
            "labels_2": "PII",
        },
        {
            "text": "doubtful",
            "text_type": "user_message",
            "labels_0": "Needs Caution",
            "labels_1": "Violence, PII",
            "labels_2": "Safe",
        },
        {
            "text": "a dialog",
            "text_type": "multi_turn",
            "labels_0": "Violence",
            "labels_1": "None",
            "labels_2": "",
        },
    ]
    assert brief(read(tmp_path, "aegis-1", "test.csv", rows)) == [
        ("prompt", "mostly safe", "safe", ()),
        ("prompt", "doubtful", "unsafe", ("Needs Caution", "PII", "Violence")),
    ]


def test_harmbench_puts_the_context_before_the_behavior(tmp_path: Path) -> None:
    rows = [
        {"Behavior": "do harm", "SemanticCategory": "illegal", "ContextString": "", "BehaviorID": "a"},
        {
            "Behavior": "use it",
            "SemanticCategory": "chemical_biological",
            "ContextString": "a paper",
            "BehaviorID": "b",
        },
    ]
    assert brief(read(tmp_path, "harmbench", "harmbench_behaviors_text_test.csv", rows)) == [
        ("prompt", "do harm", "unsafe", ("illegal",)),
        ("prompt", "a paper\n\n---\n\nuse it", "unsafe", ("chemical_biological",)),
    ]


def test_simplesafetytests_are_all_unsafe(tmp_path: Path) -> None:
    row = {"id": "1", "harm_area": "Scams & Fraud", "category": "Instructions", "prompt": "how to cheat"}
    assert brief(read(tmp_path, "simplesafetytests", "sst_test_cases.csv", [row])) == [
        ("prompt", "how to cheat", "unsafe", ("Scams & Fraud",))
    ]


@pytest.mark.parametrize(
    ("file", "label"),
    [("or-bench-80k.csv", "safe"), ("or-bench-hard-1k.csv", "safe"), ("or-bench-toxic.csv", "unsafe")],
)
def test_or_bench_is_labelled_by_its_files_name(tmp_path: Path, file: str, label: str) -> None:
    assert brief(read(tmp_path, "or-bench", file, [{"prompt": "a question", "category": "privacy"}])) == [
        ("prompt", "a question", label, ("privacy",))
    ]


def test_a_file_of_or_bench_with_another_name_is_no_guess(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: the file's name must tell its label"):
        read(tmp_path, "or-bench", "mine.csv", [{"prompt": "a question", "category": "privacy"}])


OURS = [{"id": "1", "task": "prompt", "prompt": "grüß dich", "label": "safe"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".parquet"])
def test_our_own_items_need_no_format_in_any_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    WRITERS[path.suffix](path, OURS)
    found = read_set(str(path))
    assert found.name == f"mine{suffix}"
    assert brief(list(found.items)) == [("prompt", "grüß dich", "safe", ())]


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    json_lines(Path("run:1.jsonl"), OURS)
    assert read_set("run:1.jsonl").name == "run:1.jsonl"


def test_a_drive_is_no_format() -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_set("C:/none.jsonl")


def test_an_unknown_format_is_answered_with_those_there_are() -> None:
    with pytest.raises(DataError, match="did you mean 'toxicchat'") as caught:
        read_set("toxichat:test.csv")
    assert all(name in str(caught.value) for name in FORMATS)


@pytest.mark.parametrize(
    ("name", "file", "rows", "says"),
    [
        (
            "toxicchat",
            "a.csv",
            [{"text": "x"}],
            "row 1: expected the column 'jailbreaking' of ToxicChat; there are text",
        ),
        ("beavertails", "a.jsonl", [{"prompt": "q", "response": "a", "is_safe": "maybe"}], "true or false"),
        ("simplesafetytests", "a.csv", [{"prompt": "", "harm_area": "x"}], "'prompt' must hold text"),
        ("saferlhf", "a.json", {"prompt": "q"}, "expected a list of JSON objects, not dict"),
    ],
)
def test_a_row_of_another_form_is_named_in_one_sentence(
    tmp_path: Path, name: str, file: str, rows: Any, says: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, name, file, rows)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.parquet", "a.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(DataError, match=name):
        read_set(str(tmp_path / name))


def test_a_set_that_its_authors_keep_off_the_hub_says_what_to_do() -> None:
    with pytest.raises(DataError, match="give harmbench:FILE"):
        read_set("harmbench:")


def test_the_hub_is_read_by_name_and_without_it_the_sentence_says_so(tmp_path: Path) -> None:
    # What huggingface_hub keeps of a repository that it has fetched; it finds that again without a network.
    kept = tmp_path / "hub" / "datasets--Paul--XSTest"
    snapshot = kept / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    rows = [{"id": "1", "prompt": "hi", "type": "homonyms", "label": "safe", "focus": "", "note": ""}]
    as_csv(snapshot / "xstest_prompts.csv", rows)
    program = """
import sys
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.formats import read_set
found = read_set("xstest:")
print(found.name, found.items[0].prompt)
try:
    read_set("toxicchat:hub")
except DataError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "xstest hi"
    assert "lmsys/toxic-chat" in second
    assert "toxicchat:FILE" in second


def test_a_row_without_a_response_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "", "is_safe": False, "category": {}},
        {"prompt": "a", "response": "b", "is_safe": True, "category": {}},
    ]
    assert [item.response for item in read(tmp_path, "beavertails", "test.jsonl", rows)] == ["b"]
