"""Lists of categories with ids: Llama Guard's form with what may and may not be said, and Nemotron's one-liners."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule
from rsafe_plugins.policy.translate.prose import BULLET

BEGIN = re.compile(r"<BEGIN UNSAFE CONTENT CATEGORIES>", re.IGNORECASE)
END = re.compile(r"<END UNSAFE CONTENT CATEGORIES>", re.IGNORECASE)
HEAD = re.compile(
    r"^\s*(?:[-*]\s+)?(?P<id>[A-Z]{1,3}\d{1,3})\s*[:.)]\s*(?P<name>[^.:]+(?:\.(?=\S)[^.:]*)*)[.:]?\s*(?P<rest>.*)$"
)
_FORBIDS = re.compile(
    r"^(?:should\s*(?:not|n't)|must\s*not|cannot|can\s*not|can't|don't|do not)\s*:?\s*$", re.IGNORECASE
)
_ALLOWS = re.compile(r"^(?:can|may|allowed)\s*:?\s*$", re.IGNORECASE)
_SHOULD = re.compile(r"^should\s*:?\s*$", re.IGNORECASE)
_FORBIDS_INLINE = re.compile(
    r"^(?:(?:AI|(?:the\s+|AI\s+)?models?|responses?)\s+)?(?:should not|must not|cannot|can not)\s+(?P<what>.+)",
    re.IGNORECASE,
)
_ALLOWS_INLINE = re.compile(
    r"^(?:(?:AI|(?:the\s+|AI\s+)?models?|responses?)\s+)?(?:can|may)\s+(?P<what>.+)", re.IGNORECASE
)


def looks_like(text: str) -> bool:
    """Whether a text is such a list: several lines that begin with an id."""
    return bool(BEGIN.search(text)) or sum(bool(HEAD.match(line)) for line in text.splitlines()) >= 2


def read(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Adds a list's categories to a draft.

    Returns:
        What is none of them: the lines before the list and behind it.
    """
    start = next((n for n, piece in enumerate(pieces) if BEGIN.search(piece.text)), None)
    end = next((n for n, piece in enumerate(pieces) if END.search(piece.text)), len(pieces))
    others: list[Entry] = []
    rule: Rule | None = None
    part = "covers"
    for number, piece in enumerate(pieces):
        head = HEAD.match(piece.text) if (start is None or number > start) and number < end else None
        if head:
            rule = Rule(head["name"].strip(), piece, id=head["id"], description=head["rest"].strip())
            draft.rules.append(rule)
            part = "covers"
            continue
        is_inside = rule is not None and number < end and not END.search(piece.text)
        if rule is None or not is_inside:
            others.append(Entry(piece, reason="the prompt around the categories; the guard has its own"))
            continue
        text = BULLET.sub("", piece.text).strip()
        if _FORBIDS.match(text) or _ALLOWS.match(text) or _SHOULD.match(text):
            part = "covers" if _FORBIDS.match(text) else "allows"
            rule.more.append(piece)
        elif BULLET.match(piece.text):
            getattr(rule, part).append((text.rstrip("."), piece))
        elif found := _FORBIDS_INLINE.match(text):
            rule.covers.append((found["what"].rstrip("."), piece))
        elif found := _ALLOWS_INLINE.match(text):
            rule.allows.append((found["what"].rstrip("."), piece))
        elif start is None and number + 1 < len(pieces) and _is_end(pieces[number:]):
            others.append(Entry(piece, reason="the prompt around the categories; the guard has its own"))
        else:
            rule.description = f"{rule.description} {text}".strip()
            rule.more.append(piece)
    return others


def _is_end(rest: Sequence[Piece]) -> bool:
    """Whether no more categories follow, and what does is about the answer's form."""
    if any(HEAD.match(piece.text) for piece in rest):
        return False
    return bool(
        re.search(r"\{\{|\{%|respond|output|answer|json|conversation|provide", rest[0].text, re.IGNORECASE)
    )
