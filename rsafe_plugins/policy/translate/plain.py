"""Policies as plain text or markdown: bullets under headings, or rules line by line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece
from rsafe_plugins.policy.translate.prose import BULLET, add_sentence, is_rule

HEADING = re.compile(r"^\s{0,3}#{1,6}\s+(?P<title>.+?)\s*#*\s*$|^\s*\*\*(?P<bold>[^*]+)\*\*:?\s*$")
_ALLOWED = re.compile(
    r"\b(?:allow(?:ed)?|permitted|acceptable|ok(?:ay)?|exceptions?|safe|do'?s|may)\b", re.IGNORECASE
)
_FORBIDDEN = re.compile(
    r"\b(?:not\s+allowed|forbidden|prohibited|disallowed|banned|unsafe|violat\w+|blocked?|must\s+not|should\s+not|"
    r"never|don'?ts|unacceptable|restricted|not\s+permitted)\b",
    re.IGNORECASE,
)


def read(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Adds bullets, and lines that forbid, allow or demand something.

    Returns:
        What is none of them.
    """
    others: list[Entry] = []
    forbids: bool | None = None
    has_bullets = any(BULLET.match(piece.text) for piece in pieces)
    for piece in pieces:
        heading = HEADING.match(piece.text)
        title = (heading["title"] or heading["bold"]) if heading else _title(piece.text)
        if title is not None:
            forbids = True if _FORBIDDEN.search(title) else False if _ALLOWED.search(title) else None
            others.append(Entry(piece, reason="a heading"))
        elif BULLET.match(piece.text) or (not has_bullets and is_rule(piece.text)):
            add_sentence(draft, piece, forbids=forbids)
        elif is_rule(piece.text):
            add_sentence(draft, piece)
        else:
            others.append(Entry(piece, reason="neither forbids, allows nor demands anything"))
    return others


def _title(text: str) -> str | None:
    """A line that ends with a colon introduces what follows."""
    stripped = text.strip()
    is_title = stripped.endswith(":") and not BULLET.match(text) and len(stripped) < 120
    return stripped if is_title else None
