"""Lists of categories with ids: Llama Guard's form with what may and may not be said, and Nemotron's one-liners."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rsafe_plugins.policy.translate import plain
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule
from rsafe_plugins.policy.translate.plain import heading
from rsafe_plugins.policy.translate.prose import BULLET, only_happens

BEGIN = re.compile(r"<BEGIN UNSAFE CONTENT CATEGORIES>", re.IGNORECASE)
END = re.compile(r"<END UNSAFE CONTENT CATEGORIES>", re.IGNORECASE)
HEAD = re.compile(
    r"^\s*(?:[-*]\s+)?(?P<id>[A-Z]{1,3}\d{1,3})\s*[:.)]\s*(?P<name>[^.:]+(?:\.(?=\S)[^.:]*)*)[.:]?\s*(?P<rest>.*)$"
)
# What else may be one between the marks: an id without a colon, a number, a bullet with a name.
_SPACED = re.compile(
    r"^[\s*]*(?P<id>[A-Z]{1,3}\d{1,3})\**\s*(?:[:.)\u2013\u2014-]\s*|\s)\**(?P<name>[^.:]+)[.:]?\s*(?P<rest>.*)$"
)
_NUMBERED = re.compile(r"^\s*\(?\d{1,3}[.)]\s+(?P<name>[^.:]+)[.:]?\s*(?P<rest>.*)$")
_NAMED = re.compile(r"^\s*[-*]\s+(?P<name>[^.:]+)(?:[.:]\s*(?P<rest>.*))?$")
_APOSTROPHE = "['\u2019]?"
_WHO = r"(?:(?:(?:the\s+|AI\s+)?(?:models?|assistants?|bots?)|AI|responses?|users?|it|they)\s+)?"
_NOT = (
    r"(?:(?:should|must|may|can|could|shall|will|do|does)\s*(?:not|never)|cannot|never|"
    rf"(?:should|must|could|ca|sha|wo|do|does)n{_APOSTROPHE}t|(?:(?:is|are)\s+)?not\s+(?:allowed|permitted)(?:\s+to)?)"
)
_FORBIDS = re.compile(
    rf"^{_WHO}(?:{_NOT}|prohibited|forbidden|disallowed|banned|not\s+(?:ok|okay|acceptable))\s*:?\s*$",
    re.IGNORECASE,
)
_ALLOWS = re.compile(
    rf"^{_WHO}(?:can|may|(?:is\s+|are\s+)?(?:allowed|permitted)(?:\s+to)?)\s*:?\s*$", re.IGNORECASE
)
_SHOULD = re.compile(rf"^{_WHO}should\s*:?\s*$", re.IGNORECASE)
_FORBIDS_INLINE = re.compile(rf"^{_WHO}{_NOT}\s+(?P<what>.+)", re.IGNORECASE)
# "It may include slurs" is no permission.
_ALLOWS_INLINE = re.compile(
    r"^(?:AI|(?:the\s+|AI\s+)?(?:models?|assistants?))\s+(?:can|may)\s+(?P<what>.+)", re.IGNORECASE
)
_MORE = re.compile(r"\b(?:but|only|never|unless|except|however|not)\b|n['\u2019]t\b|[.;]\s+\S", re.IGNORECASE)
_EXAMPLE = re.compile(r"for example: \"(?P<text>[^\"]+)\"")  # as `llama_guard_prompt` writes them
_NO_HEADING = 6  # only bold lines are below a category that is no heading
_AROUND = "the prompt around the categories; the guard has its own"


def looks_like(text: str) -> bool:
    """Whether a text is such a list: several lines that begin with an id."""
    return bool(BEGIN.search(text)) or sum(bool(_head(line)) for line in text.splitlines()) >= 2


def begins(text: str) -> bool:
    """Whether a text says where such a list begins."""
    return bool(BEGIN.search(text))


def read(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Adds a list's categories to a draft.

    Returns:
        What is none of them: the lines before the list and behind it.
    """
    start = next((n for n, piece in enumerate(pieces) if BEGIN.search(piece.text)), None)
    end = next((n for n, piece in enumerate(pieces) if END.search(piece.text)), len(pieces))
    heads = {n: found for n, piece in enumerate(pieces) if (found := _head(piece.text))}
    if start is None and not heads:
        return plain.read(draft, pieces, judge=True)  # rules in some other form
    if start is not None:
        heads = _heads_between(pieces, start, end)
    last = max(heads, default=-1)
    others: list[Entry] = []
    rule: Rule | None = None
    part, level = "covers", _NO_HEADING
    behind: list[Piece] = []  # what stands under a heading of its own
    for number, piece in enumerate(pieces):
        head = heads.get(number) if number < end else None
        if head:
            known = head.groupdict("")
            rule = Rule(
                known["name"].strip(" *"), piece, id=known.get("id", ""), description=known["rest"].strip()
            )
            draft.rules.append(rule)
            part = "covers"
            title = heading(piece.text)
            level = title[1] if title else _NO_HEADING
            continue
        is_inside = rule is not None and number < end and not END.search(piece.text)
        if rule is None or not is_inside:
            is_around = start is None or number <= start or number >= end
            reason = _AROUND if is_around else ""
            (behind.append(piece) if behind else others.append(Entry(piece, reason=reason)))
            continue
        text = " ".join(BULLET.sub("", piece.text).split())
        following = pieces[number + 1] if number + 1 < len(pieces) else None
        if start is None and (title := heading(piece.text)) and not (_status(text) and title[1] > level):
            rule = None
            behind.append(piece)
        elif status := _status(text):
            part = status
            rule.more.append(piece)
        elif BULLET.match(piece.text):
            if part == "description":
                rule.description = f"{rule.description} {text.rstrip('.;')};".strip()
                rule.more.append(piece)
            elif example := _EXAMPLE.fullmatch(text):
                (rule.allowed_examples if part == "allows" else rule.examples).append(
                    (example["text"], piece)
                )
            else:
                getattr(rule, part).append((text.rstrip("."), piece))
        elif introduced := _introduces(text, following):
            part = introduced
            rule.more.append(piece)
        elif (found := _FORBIDS_INLINE.match(text)) and not _MORE.search(found["what"]):
            rule.covers.append((found["what"].rstrip("."), piece))
        elif (
            not found
            and (found := _ALLOWS_INLINE.match(text))
            and not _MORE.search(found["what"].rstrip("."))
            and not only_happens(found["what"])
        ):
            rule.allows.append((found["what"].rstrip("."), piece))
        elif start is None and number > last and following is not None and _ENDS.search(piece.text):
            others.append(Entry(piece, reason=_AROUND))
        else:
            rule.description = f"{rule.description} {text}".strip()
            rule.more.append(piece)
            if following is not None and BULLET.match(following.text):
                part = "description"  # nobody knows whether it forbids what stands under it
    return [*others, *_behind(draft, behind)]


def _introduces(text: str, following: Piece | None) -> Literal["covers", "allows", ""]:
    """What a line above bullets, which is more than a status, says of them; empty where it says nothing."""
    if following is None or not BULLET.match(following.text) or BULLET.match(text):
        return ""
    if _FORBIDS_INLINE.match(text):
        return "covers"
    is_allowing = (
        text.endswith(":") and (found := _ALLOWS_INLINE.match(text)) and not _MORE.search(found["what"])
    )
    return "allows" if is_allowing else ""


def _heads_between(pieces: Sequence[Piece], start: int, end: int) -> dict[int, re.Match[str]]:
    """The categories' first lines between the marks, however they are written."""
    lines = {n: pieces[n].text for n in range(start + 1, end) if not _status(pieces[n].text)}
    found = {n: head for n, line in lines.items() if (head := _head(line) or _SPACED.match(line))}
    if found:
        # "C4 charges" below "S1: Weapons" is no category.
        letters = _letters(found[min(found)])
        return {n: head for n, head in found.items() if _letters(head) == letters}
    for form in (_NUMBERED, _NAMED):
        if found := {n: head for n, line in lines.items() if (head := form.match(line))}:
            return found
    return {}


def _letters(head: re.Match[str]) -> str:
    return head["id"].rstrip("0123456789")


def _behind(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Sections behind the categories: rules where their heading forbids or allows."""
    sections: list[list[Piece]] = []
    for piece in pieces:
        if heading(piece.text):
            sections.append([])
        sections[-1].append(piece)
    others: list[Entry] = []
    for section in sections:
        title = heading(section[0].text)
        if title and plain.polarity(title[0]) in ("forbids", "allows"):
            others += plain.read(draft, section)
            continue
        for number, piece in enumerate(section):
            is_around = number == 0 or _ENDS.search(piece.text)
            others.append(Entry(piece, reason=_AROUND if is_around else ""))
    return others


def _head(line: str) -> re.Match[str] | None:
    """A category's first line; a question is none."""
    title = heading(line)
    found = HEAD.match(title[0] if title else line)
    return None if found is None or line.rstrip().endswith("?") else found


def _status(text: str) -> str:
    """What a line that introduces bullets says of them."""
    title = heading(text)
    line = " ".join((title[0] if title else text).split())
    if _FORBIDS.match(line):
        return "covers"
    return "allows" if _ALLOWS.match(line) or _SHOULD.match(line) else ""


_ENDS = re.compile(r"\{\{|\{%|respond|output|answer|json|conversation|provide", re.IGNORECASE)
