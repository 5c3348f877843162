"""NeMo parses its whole library anew for every app; what it made of a file is kept, and each app gets a copy."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
from nemoguardrails.colang.v1_0.lang import parser as parser_1
from nemoguardrails.colang.v2_x.lang import parser as parser_2


def _kept(parse: Callable[..., Any]) -> Callable[..., Any]:
    @lru_cache(maxsize=256)
    def pickled(filename: str, content: str, mapping: bool) -> bytes:
        return pickle.dumps(parse(filename, content, mapping))

    def parsed(filename: str, content: str, include_source_mapping: bool = True) -> Any:
        return pickle.loads(pickled(filename, content, include_source_mapping))

    return parsed


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for parser in (parser_1, parser_2):
            patch.setattr(parser, "parse_colang_file", _kept(parser.parse_colang_file))
        yield
