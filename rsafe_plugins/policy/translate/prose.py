"""Rules written as sentences: what is forbidden, what is allowed, and what must be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rsafe_plugins.policy.translate.pieces import Draft, Piece, Rule

BULLET = re.compile(r"^\s*(?:[-*+\u2022\u2013]|\d{1,3}[.)])\s+(?=\S)")

_SUBJECT = r"(?:(?:the\s+)?(?:users?|bots?|assistants?|(?:ai\s+)?models?|agents?|ai|employees?|customers?)?(?:'s)?\s*)"
_WHAT = (
    r"(?:(?:messages?|responses?|answers?|outputs?|inputs?|content|requests?|queries|text|it|they|you)\s+)?"
)
_NOT = (
    r"(?:should\s+not|shouldn['\u2019]?t|must\s+not|mustn['\u2019]?t|may\s+not|can\s*not|cannot|can['\u2019]?t|"
    r"do(?:es)?\s+not|do(?:es)?n['\u2019]?t|is\s+not\s+allowed\s+to|are\s+not\s+allowed\s+to|not\s+allowed\s+to|never|"
    r"should\s+never|must\s+never|refuse\s+to)"
)
_WITHOUT = re.compile(
    r"^(?:please\s+)?(?:avoid|refrain\s+from|no|keep\s+away\s+from)\b\s+(?P<what>.+)",
    re.IGNORECASE | re.DOTALL,
)
_FORBIDS = re.compile(
    rf"^{_SUBJECT}{_WHAT}(?:are\s+|is\s+)?{_NOT}\b\s+(?P<what>.+)", re.IGNORECASE | re.DOTALL
)
_FORBIDDEN = re.compile(
    r"^(?P<what>.+?)\s+(?:is|are)\s+(?:strictly\s+)?(?:forbidden|prohibited|banned|not\s+(?:allowed|permitted|ok(?:ay)?))\b",
    re.IGNORECASE | re.DOTALL,
)
_ALLOWS = re.compile(
    rf"^(?:{_SUBJECT}{_WHAT}(?:may|can|is\s+allowed\s+to|are\s+allowed\s+to)|"
    r"it(?:['\u2019]s|\s+is)?\s+(?:ok(?:ay)?|fine|allowed|acceptable|permitted)(?:\s+(?:to|for|if|that|when))?|"
    r"(?:allowed|permitted|acceptable|ok(?:ay)?)\s*:?(?:\s+to)?)\b\s*(?P<what>.+)",
    re.IGNORECASE | re.DOTALL,
)
_ALLOWED = re.compile(
    r"^(?P<what>.+?)\s+(?:is|are)\s+(?:ok(?:ay)?|fine|allowed|permitted|acceptable)\s*\.?$",
    re.IGNORECASE | re.DOTALL,
)
_MUST = re.compile(r"\b(?:should|must|needs?\s+to|has\s+to|have\s+to|always|only)\b", re.IGNORECASE)


def add_sentence(draft: Draft, piece: Piece, *, forbids: bool | None = None) -> None:
    """Adds a rule that is written as a sentence.

    A prohibition becomes a category, a permission an exception of all of the draft's categories, and a duty a category
    that holds what breaks it.

    Args:
        draft: Where it goes.
        piece: The sentence.
        forbids: Whether its heading says that what follows is forbidden (True) or allowed (False); None where
            the sentence must say it itself.
    """
    text = BULLET.sub("", piece.text).strip().strip('"').rstrip(" .;")
    if not text:
        return
    if found := _FORBIDDEN.match(text) or _WITHOUT.match(text):
        draft.rules.append(_unwanted(found["what"], piece))
    elif found := _FORBIDS.match(text):
        draft.rules.append(_forbidden(found["what"], piece))
    elif found := _ALLOWED.match(text) or _ALLOWS.match(text):
        draft.exceptions.append((found["what"].strip(), piece))
    elif forbids is False:
        draft.exceptions.append((text, piece))
    elif _MUST.search(text) and forbids is None:
        draft.rules.append(Rule(_capital(text), piece, description=f"What breaks this rule: {text}."))
    else:
        draft.rules.append(Rule(_capital(text), piece, description=""))


def is_rule(text: str) -> bool:
    """Whether a sentence without a bullet forbids, allows or demands something."""
    line = text.strip()
    if line.endswith("?") or "{{" in line:
        return False  # asks the model that judges, or shows it what is judged
    forms = (_FORBIDDEN.match, _WITHOUT.match, _FORBIDS.match, _ALLOWED.match, _ALLOWS.match, _MUST.search)
    return any(form(line) for form in forms)


def forbids_something(text: str) -> bool:
    """Whether a sentence forbids something."""
    return bool(_FORBIDDEN.match(text.strip()) or _FORBIDS.match(text.strip()))


def sentences(text: str) -> Iterator[str]:
    """A text's sentences, one after the other."""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", " ".join(text.split())):
        if sentence.strip():
            yield sentence.strip()


def lines(text: str, file: str, key: str, first: int) -> list[Piece]:
    """A text's lines as pieces; continued bullets are one piece.

    Args:
        text: The text.
        file: Where it stands.
        key: Where it stands in there.
        first: Its first line's number.
    """
    found: list[Piece] = []
    indent = -1
    for number, line in enumerate(text.splitlines(), first):
        stripped = line.strip()
        is_bullet = bool(BULLET.match(line))
        deeper = len(line) - len(line.lstrip()) > indent
        if found and stripped and not is_bullet and indent >= 0 and deeper and BULLET.match(found[-1].text):
            found[-1] = Piece(f"{found[-1].text} {stripped}", file, found[-1].line, key)
            continue
        indent = len(line) - len(line.lstrip()) if is_bullet else -1
        if stripped:
            found.append(Piece(stripped, file, number, key))
    return found


def bullets(pieces: Iterable[Piece]) -> list[Piece]:
    """Those pieces that are bullets."""
    return [piece for piece in pieces if BULLET.match(piece.text)]


def _unwanted(what: str, piece: Piece) -> Rule:
    """A rule about a thing."""
    what = " ".join(what.split())
    thing = what if what[:2].isupper() else what[:1].lower() + what[1:]
    return Rule(_capital(what.split(",")[0]), piece, description=f"Messages with {thing}.")


def _forbidden(what: str, piece: Piece) -> Rule:
    """A rule about what a message does."""
    what = " ".join(what.split())
    name = re.sub(r"^(?:contain|include|use|share|have)\s+(?:any\s+)?", "", what, flags=re.IGNORECASE)
    return Rule(_capital(name.split(",")[0]), piece, description=f"Messages that {what}.")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
