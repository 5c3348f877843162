"""Policy documents of gpt-oss-safeguard: markdown with an instruction, definitions, criteria and examples.

The form is described in OpenAI's guide to gpt-oss-safeguard: sections for instruction, definitions, what violates and
what doesn't, and examples with the expected answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule
from rsafe_plugins.policy.translate.plain import HEADING
from rsafe_plugins.policy.translate.prose import BULLET

_SECTIONS = {
    "instruction": re.compile(
        r"\b(?:instructions?|task|role|output|response\s+format|answer)\b", re.IGNORECASE
    ),
    "definitions": re.compile(
        r"\b(?:definitions?|terms|scope|overview|goal|purpose|background)\b", re.IGNORECASE
    ),
    "examples": re.compile(r"\bexamples?\b", re.IGNORECASE),
    "allows": re.compile(
        r"\b(?:safe|non-?violat\w+|allowed|permitted|acceptable|does\s+not\s+violate|exceptions?)\b",
        re.IGNORECASE,
    ),
    "covers": re.compile(
        r"\b(?:violat\w+|unsafe|disallowed|prohibited|forbidden|not\s+allowed)\b", re.IGNORECASE
    ),
}
_CONTENT = re.compile(r"^(?:content|input|text|example|message)\s*\d*\s*:\s*(?P<text>.+)$", re.IGNORECASE)
_ANSWER = re.compile(
    r"^(?:expected|output|answer|label|classification|verdict)\s*\w*\s*:\s*(?P<answer>.+)$", re.IGNORECASE
)
_INLINE = re.compile(r"^[\"\u201c](?P<text>.+)[\"\u201d]\s*(?:->|=>|\u2192|:|-)\s*(?P<answer>\S.*)$")
_UNSAFE = re.compile(r"^[\W_]*(?:1\b|yes|unsafe|violat|true|block)", re.IGNORECASE)


def looks_like(text: str) -> bool:
    """Whether a text has such sections: what violates, and two more of the others."""
    found = {_section(title) for line in text.splitlines() if (title := _title(line))}
    return "covers" in found and len(found & {"instruction", "definitions", "allows", "examples"}) >= 2


def read(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Adds the document's one category.

    Returns:
        What is no part of it: the instruction, and headings.
    """
    others: list[Entry] = []
    rule: Rule | None = None
    section, title, waiting = "", "", None
    for piece in pieces:
        text = BULLET.sub("", piece.text).strip()
        if heading := _title(piece.text):
            if not title:
                title = heading
                rule = Rule(
                    re.sub(r"\s*(?:policy|classification)\s*$", "", title, flags=re.IGNORECASE) or title,
                    piece,
                )
                draft.rules.append(rule)
                section = _section(heading) or "definitions"
                continue
            section = _section(heading) or section
            others.append(Entry(piece, reason="a heading"))
            continue
        if rule is None:
            rule = Rule("Policy violation", piece)
            draft.rules.append(rule)
        if section == "examples":
            if found := _INLINE.match(text):
                _example(rule, found["text"], found["answer"], piece)
            elif found := _CONTENT.match(text):
                waiting = (found["text"].strip().strip('"'), piece)
            elif (found := _ANSWER.match(text)) and waiting:
                _example(rule, waiting[0], found["answer"], waiting[1])
                others.append(Entry(piece, reason="the expected answer of the example before it"))
                waiting = None
            else:
                others.append(Entry(piece, reason="in the examples, and no example with an answer"))
        elif section in ("covers", "allows"):
            getattr(rule, section).append((text.rstrip("."), piece))
        elif section == "instruction":
            others.append(
                Entry(piece, reason="an instruction to the model that judges; the guard has its own")
            )
        else:
            rule.description = f"{rule.description} {text}".strip()
            rule.more.append(piece)
    if waiting:
        others.append(Entry(waiting[1], reason="an example without an answer"))
    return others


def _example(rule: Rule, text: str, answer: str, piece: Piece) -> None:
    kind = rule.examples if _UNSAFE.match(answer.strip()) else rule.allowed_examples
    kind.append((text.strip().strip('"'), piece))


def _title(line: str) -> str | None:
    found = HEADING.match(line)
    return (found["title"] or found["bold"]).strip() if found else None


def _section(title: str) -> str:
    return next((name for name, form in _SECTIONS.items() if form.search(title)), "")
