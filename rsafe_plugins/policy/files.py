"""Policy files: text to plain data with each field's line, and one clear sentence for whatever is wrong.

YAML is read event by event instead of with a YAML loader, because a policy needs only mappings, lists and
text: no guessing of types (`id: 1` and `id: no` mean the text that stands there), no anchors that could blow
up in memory, no tags, and no recursion that a hostile file could exhaust.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from rsafe_plugins.errors import PolicyError

FileFormat = Literal["yaml", "json"]
Location = tuple[int | str, ...]

MAX_BYTES = 1024 * 1024
# A policy is four levels deep: policy, categories, category, its lists.
MAX_DEPTH = 8

_FORMATS: Mapping[str, FileFormat] = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
_YAML_NULLS = ("", "~", "null", "Null", "NULL")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s\[\]{},:"]+|\n')


@dataclass(frozen=True, slots=True)
class Document:
    """The data of a policy file.

    Attributes:
        source: What messages call the file.
        data: Dictionaries, lists and scalars.
        lines: For each field's location the line it starts on, from 1.
    """

    source: str
    data: Any
    lines: Mapping[Location, int]

    def error(self, location: Location, sentence: str) -> PolicyError:
        """The error that says `sentence` about the field at `location`."""
        nearest = location
        while nearest and nearest not in self.lines:
            nearest = nearest[:-1]
        return _error(self.source, self.lines[nearest], sentence, location)


class _Event(NamedTuple):
    kind: Literal["mapping", "list", "scalar", "end"]
    line: int
    value: Any = None


def file_format(path: Path) -> FileFormat:
    """The format that a path's suffix stands for.

    Raises:
        PolicyError: The suffix is none of .yaml, .yml, .json.
    """
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise PolicyError(
            f"{source_name(path)}: expected a policy file whose name ends in .yaml, .yml or .json; rename it."
        ) from None


def source_name(path: Path) -> str:
    """A path as messages name it: as it is, or quoted where it has characters that can't be printed."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def read_text(path: Path) -> str:
    """The text of a policy file.

    Raises:
        FileNotFoundError: There is none.
        PolicyError: It is no regular file, unreadable, larger than 1 MiB, or not UTF-8.
    """
    source = source_name(path)
    raw = b""
    try:
        status = path.stat()
        # Opening a pipe would wait for its writer.
        regular = stat.S_ISREG(status.st_mode)
        if regular and status.st_size <= MAX_BYTES:
            raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(
            f"{source}: the file can't be read ({reason}); check path and permissions."
        ) from None
    if not regular:
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise PolicyError(f"{source}: expected a policy file, but this is {kind}; name a file.")
    check_size(status.st_size, source)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        sentence = f"expected UTF-8, but byte 0x{raw[error.start]:02x} isn't; save the file as UTF-8"
        raise _error(source, line, sentence) from None


def write_text(path: Path, text: str) -> None:
    """Writes a policy file.

    Raises:
        PolicyError: It can't be written.
    """
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(
            f"{source_name(path)}: the file can't be written ({reason}); choose another place."
        ) from None


def parse(text: str, file_format: FileFormat, source: str) -> Document:
    """The data and lines of a policy's YAML or JSON text.

    Raises:
        PolicyError: The text is larger than 1 MiB, is not well-formed, or uses what no policy needs.
    """
    try:
        check_size(len(text.encode()), source)
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise _error(source, line, "expected text, but this has a lone surrogate; remove it") from None
    text = text.removeprefix("\ufeff")
    events = _yaml_events(text, source) if file_format == "yaml" else _json_events(text, source)
    lines: dict[Location, int] = {}
    first = next(events, None)
    if first is None:
        raise PolicyError(
            f"{source}: expected a policy with a name and categories, but this is empty; write one."
        )
    data = _build(first, events, (), lines, source)
    surplus = next(events, None)
    if surplus is not None:
        raise _error(source, surplus.line, "a second document starts here; keep one policy in a file")
    return Document(source, data, lines)


def to_yaml(data: Any) -> str:
    """The data as YAML."""
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def to_json(data: Any) -> str:
    """The data as JSON."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def describe(error: ValidationError, document: Document, keys: Mapping[int, Iterable[str]]) -> PolicyError:
    """One sentence about the first thing that validation found wrong with a document.

    Args:
        error: What pydantic found.
        document: What it was found in.
        keys: The keys that a mapping may have, by the mapping's depth.
    """
    # A misspelt key also makes the right one missing, and the misspelling is what to mend.
    details = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    location, kind, value = details["loc"], details["type"], details["input"]
    if kind == "extra_forbidden":
        sentence = f"unknown key {choices(str(location[-1]), keys[len(location) - 1])}"
    elif kind == "missing":
        sentence = f"the required key {shown(location[-1])} is missing; add it"
    elif kind == "string_type":
        sentence = f"expected text, but this is {_what(value)}; write text"
    elif kind == "tuple_type":
        sentence = f"expected a list, but this is {_what(value)}; write one, as in [a, b]"
    elif kind == "model_type":
        sentence = (
            f"expected a mapping with the keys {', '.join(keys[len(location)])}, but this is {_what(value)}"
        )
    elif kind == "literal_error":
        expected = re.findall(r"'(\w+)'", details["ctx"]["expected"])
        sentence = f"unknown value {choices(str(value), expected)}"
    else:
        location = details.get("ctx", {}).get("at", location)
        sentence = details["msg"]
    return document.error(location, sentence)


def choices(word: str, known: Iterable[str]) -> str:
    """An unknown word as messages quote it, with what was probably meant and what it can be."""
    names = list(known)
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word[:100].casefold(), folded, n=1)
    meant = f" (did you mean {folded[near[0]]!r}?)" if near else ""
    more = ", ..." if len(names) > 20 else ""
    return f"{shown(word)}{meant}; it can be {', '.join(names[:20])}{more}"


def shown(value: object) -> str:
    """A value as messages quote it: on one line, and not long."""
    text = str(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _error(source: str, line: int, sentence: str, location: Location = ()) -> PolicyError:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    field = shown(field)[1:-1]
    return PolicyError(f"{source}, line {line}{', field ' if field else ''}{field}: {sentence}.")


def check_size(size: int, source: str) -> None:
    """Refuses what is larger than a policy file may be, with a PolicyError."""
    if size > MAX_BYTES:
        raise PolicyError(
            f"{source}: a policy file has at most 1 MiB, but this has {size / MAX_BYTES:.2f} MiB; "
            f"check that it is a policy."
        )


def _what(value: object) -> str:
    if value is None or value == "":
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {shown(value)}" if isinstance(value, str) else json.dumps(value)[:60]


def _line(mark: Any) -> int:
    return int(mark.line) + 1 if mark else 1


def _yaml_events(text: str, source: str) -> Iterator[_Event]:
    import yaml

    # libyaml's parser is many times faster; the one in Python is there for platforms without it.
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        for event in yaml.parse(text, Loader=loader):
            line = _line(event.start_mark)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise _error(
                    source, line, "anchors (&) and aliases (*) are refused; write the text out, in quotes"
                )
            if getattr(event, "tag", None) is not None:
                raise _error(
                    source, line, "tags (!) are refused; write plain text, in quotes if it begins with !"
                )
            if isinstance(event, yaml.MappingStartEvent):
                yield _Event("mapping", line)
            elif isinstance(event, yaml.SequenceStartEvent):
                yield _Event("list", line)
            elif isinstance(event, yaml.CollectionEndEvent):
                yield _Event("end", line)
            elif isinstance(event, yaml.ScalarEvent):
                empty = event.implicit[0] and event.value in _YAML_NULLS
                yield _Event("scalar", line, None if empty else event.value)
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark or error.context_mark)
        problem = error.problem or error.context
        sentence = f"this is not YAML ({problem}); check indentation, colons, brackets and quotes"
        raise _error(source, line, sentence) from None
    except yaml.reader.ReaderError as error:
        # Not its position, which counts bytes or characters, depending on the parser.
        character = int(error.character)
        line = text.count("\n", 0, text.find(chr(character))) + 1
        sentence = f"the character U+{character:04X} can't stand in YAML; remove it"
        raise _error(source, line, sentence) from None


def _json_events(text: str, source: str) -> Iterator[_Event]:
    if not text.strip():
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise _error(
            source, error.lineno, f"this is not JSON ({error.msg}); check commas, brackets and quotes"
        ) from None
    except ValueError:
        raise _error(source, 1, "a number has too many digits; a policy has only text and lists") from None
    except RecursionError:
        raise _error(source, 1, "brackets are nested too deeply for a policy; flatten them") from None

    line = 1
    for match in _JSON_TOKEN.finditer(text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token == "{":
            yield _Event("mapping", line)
        elif token == "[":
            yield _Event("list", line)
        elif token in ("}", "]"):
            yield _Event("end", line)
        else:
            yield _Event("scalar", line, json.loads(token))


def _build(
    event: _Event, events: Iterator[_Event], location: Location, lines: dict[Location, int], source: str
) -> Any:
    """The data that begins with `event`; notes the line of everything in it."""
    lines[location] = event.line
    if event.kind == "scalar":
        return event.value
    if len(location) >= MAX_DEPTH:
        raise _error(
            source, event.line, "lists and mappings are nested too deeply for a policy; flatten them"
        )
    if event.kind == "list":
        items: list[Any] = []
        while (item := next(events)).kind != "end":
            items.append(_build(item, events, (*location, len(items)), lines, source))
        return items
    mapping: dict[str, Any] = {}
    while (key := next(events)).kind != "end":
        if not isinstance(key.value, str):
            raise _error(
                source, key.line, "expected a key that is text; write one before the colon", location
            )
        if key.value in mapping:
            first = lines[(*location, key.value)]
            sentence = f"the key {shown(key.value)} stands on line {first} already; remove one"
            raise _error(source, key.line, sentence, location)
        mapping[key.value] = _build(next(events), events, (*location, key.value), lines, source)
        lines[(*location, key.value)] = key.line
    return mapping
