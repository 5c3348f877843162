"""What the subcommands share: the guard they use, and output that can't attack a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rsafe_plugins import Guard


def make_guard(**settings: Any) -> Guard:
    """The guard of a command. Settings that are None take their default. Tests put their own guard here."""
    return Guard(**settings)


class Threshold(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """A probability, or a file that `rsafe eval --fit` wrote."""

    name = "P|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | Path:
        """A number from 0 to 1, or else a path."""
        try:
            float(value)
        except ValueError:
            return Path(value)
        return click.FloatRange(0, 1).convert(value, param, ctx)


def printable(text: str) -> str:
    r"""Text for a terminal: everything that is no visible character or line feed is written as its escape.

    Text under judgement may hold escape sequences that move the cursor, recolor or rewrite what stands on the
    screen, or direction marks that reorder it.
    """
    return "".join(
        char if char == "\n" or char.isprintable() else ascii(char)[1:-1]
        for char in text.replace("\xa0", " ")
    )


def excerpt(text: str, width: int) -> str:
    """The beginning of a text as one printable line of at most `width` characters."""
    line = printable(" ".join(text[: 4 * width].split()))
    return line if len(line) <= width and len(text) <= 4 * width else line[: width - 1] + "…"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1, which says "blocked"


def console(*, stderr: bool = False) -> Console:
    """The console for people, on standard output. Markup is off: text is printed as it stands."""
    return _Console(markup=False, highlight=False, emoji=False, stderr=stderr)


def print_json(value: Any) -> None:
    """Prints one JSON line. It is ASCII, so any locale can print it."""
    click.echo(json.dumps(value))
