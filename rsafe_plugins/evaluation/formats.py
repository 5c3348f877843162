"""Public data sets for guards, each in the form it is published in, read from a file or from the Hugging Face hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.files import Row, rows
from rsafe_plugins.evaluation.items import LabelledItem, labelled, read_items
from rsafe_plugins.policy.files import choices

Fields = dict[str, Any]

_OPENAI_CODES = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
_SAFE_IN_AEGIS_1 = "Safe"


@dataclass(frozen=True, slots=True)
class Format:
    """How a public data set becomes items.

    Attributes:
        title: Its name as its authors write it.
        items: The fields of the items that a row holds, from the row and its file's name. What has no label is left
            out.
        hub: Its repository on the Hugging Face hub; empty where there is none of its authors'.
        files: Which files of the repository hold the test items, as glob patterns.
    """

    title: str
    items: Callable[[Row, str], Iterator[Fields]]
    hub: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Labelled items and where they come from.

    Attributes:
        name: What was asked for, such as `mine.jsonl` or `toxicchat:test.csv`, without folders.
        items: The items, in the source's order.
    """

    name: str
    items: Sequence[LabelledItem]


def read_set(source: str) -> LabelledSet:
    """The items that a source names.

    Args:
        source: A file of ours; or `FORMAT:FILE`, a file of a public data set as it is published; or `FORMAT:` or
            `FORMAT:hub`, the test items of the data set from the Hugging Face hub. The formats are those in `FORMATS`.

    Raises:
        DataError: There is no such format or file, it can't be read, or it holds no labelled item.
    """
    name, colon, rest = source.partition(":")
    # One letter is a drive of Windows, and an existing file is a file, whatever its name holds.
    if not colon or len(name) < 2 or (name not in FORMATS and Path(source).exists()):
        return LabelledSet(Path(source).name, read_items(source))
    if name not in FORMATS:
        raise DataError(
            f"There is no data format {choices(name, FORMATS)}; a file of rsafe's own form needs no format."
        )
    form = FORMATS[name]
    if rest in ("", "hub"):
        return LabelledSet(name, _read(form, _downloaded(name, form)))
    return LabelledSet(f"{name}:{Path(rest).name}", _read(form, [Path(rest)]))


def _read(form: Format, paths: Sequence[Path]) -> list[LabelledItem]:
    items = [item for path in paths for item in _items(form, path, prefix=len(paths) > 1)]
    if not items:
        raise DataError(
            f"{', '.join(map(str, paths))}: expected labelled rows of {form.title}; there is none."
        )
    return items


def _items(form: Format, path: Path, *, prefix: bool) -> Iterator[LabelledItem]:
    for number, (place, row) in enumerate(rows(path), 1):
        where = f"{path}, {place}"
        try:
            found = list(form.items(row, path.name))
        except KeyError as error:
            raise DataError(
                f"{where}: expected the column {error} of {form.title}; there are {', '.join(map(str, row))}."
            ) from error
        except ValueError as error:
            raise DataError(f"{where}: {error} ({form.title}).") from error
        except (TypeError, AttributeError) as error:
            raise DataError(f"{where}: a cell is missing or of another type than in {form.title}.") from error
        for position, fields in enumerate(found):
            identity = f"{number}.{position}" if position else f"{number}"
            yield labelled({"id": f"{path.stem}-{identity}" if prefix else identity, **fields}, where)


def _downloaded(name: str, form: Format) -> list[Path]:
    if not form.hub:
        raise DataError(
            f"The authors of {form.title} don't publish it on the hub: fetch its file, and give {name}:FILE."
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise DataError(
            f'Reading {form.title} from the hub needs huggingface-hub: pip install "rsafe-plugins[eval]".'
        ) from error
    try:
        folder = Path(snapshot_download(form.hub, repo_type="dataset", allow_patterns=list(form.files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"The hub doesn't give {form.hub} ({type(error).__name__}): check the network, and log in with `hf auth "
            f"login` where its authors ask for consent; or give its file, {name}:FILE."
        ) from error
    paths = [path for pattern in form.files for path in sorted(folder.glob(pattern))]
    if not paths:
        raise DataError(
            f"{form.hub} on the hub no longer has {' or '.join(form.files)}: give its file, {name}:FILE."
        )
    return paths


def _prompt(text: Any, unsafe: bool, *categories: str) -> Fields:
    return {
        "task": "prompt",
        "prompt": text,
        "label": "unsafe" if unsafe else "safe",
        "categories": _named(categories),
    }


def _response(prompt: Any, text: Any, unsafe: bool, *categories: str) -> Fields:
    return {**_prompt(prompt, unsafe, *categories), "task": "response", "response": text}


def _named(categories: Sequence[str]) -> tuple[str, ...]:
    return tuple(category.strip() for category in categories if category and category.strip())


def _flag(row: Row, column: str) -> bool:
    """A column that says yes or no, as the different file formats write it."""
    value = row[column]
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    word = str(value).lower()
    if word not in known:
        raise ValueError(f"the column {column!r} must say true or false, not {word[:20]!r}")
    return known[word]


def _harmful(row: Row, column: str, unsafe: str, safe: str) -> bool | None:
    """A column with a word for unsafe and one for safe; None where it is empty."""
    word = row[column] or None
    if word not in (unsafe, safe, None):
        raise ValueError(f"the column {column!r} must say {unsafe} or {safe}, not {str(word)[:20]!r}")
    return None if word is None else word == unsafe


def _true_names(flags: Any) -> tuple[str, ...]:
    """The names that a mapping says are true."""
    return tuple(name for name, is_true in flags.items() if is_true) if isinstance(flags, dict) else ()


def _openai_moderation(row: Row, file: str) -> Iterator[Fields]:
    # A code that is missing wasn't annotated; Markov et al. 2023 take an item for unsafe by the codes it has.
    codes = [code for code in _OPENAI_CODES if str(row.get(code)) in ("1", "1.0")]
    if not any(code in row for code in _OPENAI_CODES):
        raise KeyError(_OPENAI_CODES[0])
    yield _prompt(row["prompt"], bool(codes), *codes)


def _toxicchat(row: Row, file: str) -> Iterator[Fields]:
    # Guards are compared on what people annotated; the other labels are those of a classifier.
    if "human_annotation" not in row or _flag(row, "human_annotation"):
        jailbreak = ("jailbreaking",) if _flag(row, "jailbreaking") else ()
        yield _prompt(row["user_input"], _flag(row, "toxicity"), *jailbreak)


def _wildguard(row: Row, file: str) -> Iterator[Fields]:
    category = row.get("subcategory") or ""
    of_prompt = _harmful(row, "prompt_harm_label", "harmful", "unharmful")
    of_response = _harmful(row, "response_harm_label", "harmful", "unharmful")
    if of_prompt is not None:
        yield _prompt(row["prompt"], of_prompt, category)
    if of_response is not None and row["response"]:
        yield _response(row["prompt"], row["response"], of_response, category)


def _beavertails(row: Row, file: str) -> Iterator[Fields]:
    unsafe = not _flag(row, "is_safe")
    if row["response"]:
        yield _response(row["prompt"], row["response"], unsafe, *_true_names(row.get("category")))


def _saferlhf(row: Row, file: str) -> Iterator[Fields]:
    for number in (0, 1):
        categories = _true_names(row.get(f"response_{number}_harm_category"))
        unsafe = not _flag(row, f"is_response_{number}_safe")
        if response := row[f"response_{number}"]:
            yield _response(row["prompt"], response, unsafe, *categories)


def _xstest(row: Row, file: str) -> Iterator[Fields]:
    kind = row["type"]
    # The first version has no labels, but names the types of unsafe prompts after the safe ones they contrast with.
    unsafe = _harmful(row, "label", "unsafe", "safe") if row.get("label") else kind.startswith("contrast_")
    yield _prompt(row["prompt"], bool(unsafe), kind)


def _aegis(row: Row, file: str) -> Iterator[Fields]:
    categories = (row.get("violated_categories") or "").split(",")
    of_prompt = _harmful(row, "prompt_label", "unsafe", "safe")
    of_response = _harmful(row, "response_label", "unsafe", "safe")
    # The text of some prompts may not be passed on and has to be put back from its own source.
    if row["prompt"] == "REDACTED":
        return
    if of_prompt is not None:
        yield _prompt(row["prompt"], of_prompt, *categories)
    if of_response is not None and row["response"]:
        yield _response(row["prompt"], row["response"], of_response, *categories)


def _aegis_1(row: Row, file: str) -> Iterator[Fields]:
    # The other types are whole dialogs, labelled as one.
    if row["text_type"] != "user_message":
        return
    votes = [row.get(f"labels_{number}") for number in range(5)]
    given = [vote for vote in votes if vote and vote != "None"]
    if not given:
        return
    unsafe = [vote for vote in given if vote != _SAFE_IN_AEGIS_1]
    categories = Counter(name.strip() for vote in unsafe for name in vote.split(","))
    # "Needs Caution" is unsafe, as in the paper's defensive reading; so is a tie.
    is_unsafe = 2 * len(unsafe) >= len(given)
    yield _prompt(row["text"], is_unsafe, *(sorted(categories) if is_unsafe else ()))


def _harmbench(row: Row, file: str) -> Iterator[Fields]:
    context = row.get("ContextString")
    behavior = row["Behavior"]
    yield _prompt(f"{context}\n\n---\n\n{behavior}" if context else behavior, True, row["SemanticCategory"])


def _simplesafetytests(row: Row, file: str) -> Iterator[Fields]:
    yield _prompt(row["prompt"], True, row["harm_area"])


def _or_bench(row: Row, file: str) -> Iterator[Fields]:
    kinds = {"80k": False, "hard": False, "toxic": True}
    found = [unsafe for kind, unsafe in kinds.items() if kind in file.lower()]
    if len(found) != 1:
        raise ValueError(
            "the file's name must tell its label: 80k or hard for safe prompts, toxic for unsafe ones"
        )
    yield _prompt(row["prompt"], found[0], row["category"])


FORMATS: dict[str, Format] = {
    "openai-moderation": Format(
        "the OpenAI moderation set",
        _openai_moderation,
        "mmathys/openai-moderation-api-evaluation",
        ("samples-1680.jsonl*",),
    ),
    "toxicchat": Format(
        "ToxicChat", _toxicchat, "lmsys/toxic-chat", ("data/0124/toxic-chat_annotation_test.csv",)
    ),
    "wildguard": Format(
        "WildGuardTest", _wildguard, "allenai/wildguardmix", ("test/wildguard_test.parquet",)
    ),
    "beavertails": Format(
        "BeaverTails", _beavertails, "PKU-Alignment/BeaverTails", ("round0/30k/test.jsonl*",)
    ),
    "saferlhf": Format("PKU-SafeRLHF", _saferlhf, "PKU-Alignment/PKU-SafeRLHF", ("data/*/test.jsonl*",)),
    "xstest": Format("XSTest", _xstest, "Paul/XSTest", ("xstest_prompts.csv",)),
    "aegis": Format("Aegis 2.0", _aegis, "nvidia/Aegis-AI-Content-Safety-Dataset-2.0", ("test.json",)),
    "aegis-1": Format("Aegis 1.0", _aegis_1),
    "harmbench": Format("HarmBench", _harmbench),
    "simplesafetytests": Format(
        "SimpleSafetyTests", _simplesafetytests, "Bertievidgen/SimpleSafetyTests", ("sst_test_cases.csv",)
    ),
    "or-bench": Format(
        "OR-Bench", _or_bench, "bench-llm/or-bench", ("or-bench-hard-1k.csv", "or-bench-toxic.csv")
    ),
}
"""The public data sets by name."""
