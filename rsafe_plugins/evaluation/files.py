"""Reads rows from the files that labelled data is published in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rsafe_plugins.errors import DataError

Row = dict[str, Any]

_OPEN: dict[str, Callable[[Path], Any]] = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile}
_LONGEST_FIELD = 2**30  # of a CSV file, in characters; the csv module's own limit is 128 KiB


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file: JSON Lines, or by its suffix `.json` (a list), `.csv` or `.parquet`.

    All but Parquet may be compressed, as `.gz` or `.xz`.

    Yields:
        Where the row stands, for messages, such as `line 3`; and the row.

    Raises:
        DataError: The file can't be read, or isn't of that form.
    """
    kind = Path(path.stem).suffix if path.suffix in _OPEN else path.suffix
    read = {".json": _json, ".csv": _csv}.get(kind, _json_lines)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with (
            _OPEN.get(path.suffix, _plain)(path) as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
        ):
            yield from read(path, text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).") from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} can't be unpacked: it is damaged or not a {path.suffix} file.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or type(error).__name__}.") from error


def _plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _json_lines(path: Path, text: io.TextIOBase) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            place = f"line {number}"
            yield place, _object(_parsed(line, f"{path}, {place}"), f"{path}, {place}")


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    whole = text.read()
    first, _, others = whole.strip().partition("\n")
    if others and _is_json(first):
        yield from _json_lines(path, io.StringIO(whole))  # so named, but an object a line
        return
    listed = _parsed(whole, str(path))
    if not isinstance(listed, list):
        raise DataError(f"{path}: expected a list of JSON objects, not {type(listed).__name__}.")
    for number, row in enumerate(listed, 1):
        place = f"row {number}"
        yield place, _object(row, f"{path}, {place}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # also where a number has thousands of digits
        said = error.msg if isinstance(error, json.JSONDecodeError) else "it can't be parsed"
        raise DataError(f"{where}: expected a JSON object ({said}).") from error
    except RecursionError as error:
        raise DataError(f"{where}: expected a JSON object; this is nested too deep.") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, not {type(value).__name__}.")
    return value


def _csv(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        for number, row in enumerate(csv.DictReader(text), 1):
            yield f"row {number}", row
    except csv.Error as error:
        raise DataError(f"{path}: expected a CSV file with a line of column names ({error}).") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f'Reading {path} needs pyarrow: pip install "rsafe-plugins[eval]", or convert it to JSON Lines.'
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file.") from error
