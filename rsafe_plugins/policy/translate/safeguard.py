"""Policy documents of gpt-oss-safeguard: markdown with an instruction, definitions, criteria and examples.

The form is described in OpenAI's guide to gpt-oss-safeguard: sections for instruction, definitions, what violates and
what doesn't, and examples with the expected answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule
from rsafe_plugins.policy.translate.plain import heading, polarity
from rsafe_plugins.policy.translate.prose import BULLET

_SECTIONS = {
    "instruction": re.compile(
        r"\b(?:instructions?|task|role|output|response\s+format|answer)\b", re.IGNORECASE
    ),
    "definitions": re.compile(
        r"\b(?:definitions?|terms|scope|overview|goal|purpose|background)\b", re.IGNORECASE
    ),
    "examples": re.compile(r"\bexamples?\b", re.IGNORECASE),
}
_SAID = {"forbids": "covers", "allows": "allows"}
_CONTENT = r"(?:content|input|text|example|message)\s*\d*\s*:"
_EXPECTED = r"(?:expected|output|answer|label|classification|verdict)(?:\s+\w+)?\s*:"
_WITH_CONTENT = re.compile(rf"^{_CONTENT}\s*(?P<text>\S.*)$", re.IGNORECASE)
_WITH_ANSWER = re.compile(rf"^{_EXPECTED}\s*(?P<answer>\S.*)$", re.IGNORECASE)
_BOTH = re.compile(
    rf"^{_CONTENT}\s*(?P<text>\S.*)\s(?:{_EXPECTED}|->|=>|\u2192)\s*(?P<answer>\S.*)$", re.IGNORECASE
)
_INLINE = re.compile(r"^[\"\u201c](?P<text>.+?)[\"\u201d]\s*(?:->|=>|\u2192|:|-)\s*(?P<answer>\S.*)$")
_ARROW = re.compile(r"^(?P<text>.*\S)\s*(?:->|=>|\u2192)\s*(?P<answer>\S.*)$")
_TABLE_LINE = re.compile(r"^\|[\s:|-]+$")
_KEY = re.compile(
    r"^\W*(?:violat\w+|label|answer|verdict|classification|unsafe|harmful|output)\W*[:=]\s*", re.IGNORECASE
)
_SAFE = re.compile(
    r"^[\W_]*(?:0\b|[A-Z]{1,4}0+\b|no\b(?!\s+way)|non\b|not\s+(?:a\s+)?violat|does\s+not\s+violat|safe\b|"
    r"valid\b|benign\b|harmless\b|allow(?:ed)?\b|false\b|compliant\b|ok(?:ay)?\b|acceptable\b)",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^[\W_]*(?P<what>safe|acceptable|allowed|compliant|ok(?:ay)?|benign|harmless|valid)\W*[:=?]\W*"
    r"(?P<answer>(?:yes|no|true|false|[01])\b.*)$",
    re.IGNORECASE,
)
# What stands behind a yes or no and says the other thing.
_REFUSED = re.compile(
    r"\b(?:refus\w+|reject\w*|block\w*|must|should|not\s+(?:permitted|allowed|ok|acceptable|safe))\b",
    re.IGNORECASE,
)
_PERMITTED = re.compile(
    r"(?<!not )\b(?:permitted|allowed|fine|ok(?:ay)?|acceptable|harmless|benign|safe)\b", re.IGNORECASE
)
_YES_NO = re.compile(r"^[\W_]*(?P<said>yes|no)\b(?P<rest>.*)$", re.IGNORECASE | re.DOTALL)
_UNSAFE = re.compile(
    r"^[\W_]*(?:1\b|[A-Z]{1,4}[1-9]\d*\b|yes\b|unsafe\b|violat|true\b|block(?:ed)?\b|invalid\b|harmful\b|"
    r"not\s+(?:safe|allowed|acceptable|ok)\b|flag(?:ged)?\b|disallowed\b|forbidden\b|prohibited\b)",
    re.IGNORECASE,
)


def looks_like(text: str) -> bool:
    """Whether a text has such sections: what violates, and two more of the others."""
    found = {_section(title[0]) for line in text.splitlines() if (title := heading(line))}
    return "covers" in found and len(found & {"instruction", "definitions", "allows", "examples"}) >= 2


def read(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Adds the document's one category.

    Returns:
        What is no part of it: the instruction, and headings.
    """
    others: list[Entry] = []
    rule: Rule | None = None
    section, depth = "", 0
    waiting: tuple[str, Piece] | None = None
    heads = [found for piece in pieces if (found := heading(piece.text))]
    columns: list[str] = []  # what the table's head calls them
    for number, piece in enumerate(pieces):
        text = " ".join(BULLET.sub("", piece.text).split())
        found = heading(piece.text)
        if waiting and (found or not _WITH_ANSWER.match(text)):
            others.append(Entry(waiting[1], reason="an example without an answer"))
            waiting = None
        if found:
            title, level = found
            if rule is None and _is_title(title, level, heads):
                name = re.sub(r"\s*(?:policy|classification)\s*$", "", title, flags=re.IGNORECASE)
                rule = Rule(name or title, piece)
                draft.rules.append(rule)
                section, depth = "definitions", 0
            elif rule is not None and section in ("covers", "allows") and level > depth:
                # What stands under it is of the section, whatever words it has.
                getattr(rule, section).append((title, piece))
            else:
                named = _section(title)
                if named and not (section == "examples" and level > depth > 0):
                    section, depth = named, level
                elif section not in ("", "definitions"):
                    section = "unknown"  # its heading says none of them
                others.append(Entry(piece, reason="a heading"))
            continue
        if rule is None:
            rule = Rule("Policy violation", piece)
            draft.rules.append(rule)
        if _TABLE_LINE.match(text):
            others.append(Entry(piece, reason="a line of a table"))
            continue
        cells = [cell.strip() for cell in text.strip("|").split("|")] if text.startswith("|") else []
        text = ": ".join(filter(None, cells)) if cells else text
        columns = columns if cells else []
        below = pieces[number + 1].text if number + 1 < len(pieces) else ""
        if cells and _TABLE_LINE.match(" ".join(below.split())):
            columns = cells
            others.append(Entry(piece, reason="the head of a table"))
            continue
        if section == "examples":
            if len(cells) > 1 and _is_unsafe(cells[-1]) is not None:
                asked = f"{columns[-1]}: {cells[-1]}" if len(columns) == len(cells) else ""
                expected = asked if _QUESTION.match(asked) else cells[-1]
                others += _example(rule, ": ".join(cells[:-1]), expected, piece)
            elif both := _BOTH.match(text) or _INLINE.match(text):
                others += _example(rule, both["text"], both["answer"], piece)
            elif content := _WITH_CONTENT.match(text):
                waiting = (content["text"], piece)
            elif waiting and (answer := _WITH_ANSWER.match(text)):
                entries = _example(rule, waiting[0], answer["answer"], waiting[1])
                reason = "" if entries else "the expected answer of the example before it"
                others += [*entries, Entry(piece, reason=reason)]
                waiting = None
            elif both := _ARROW.match(text):
                others += _example(rule, both["text"], both["answer"], piece)
            else:
                others.append(Entry(piece))
        elif section in ("covers", "allows"):
            getattr(rule, section).append((text.rstrip("."), piece))
        elif section == "unknown":
            others.append(Entry(piece))
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


def _is_title(title: str, level: int, heads: Sequence[tuple[str, int]]) -> bool:
    """Whether a document's first heading is its title, not its first section."""
    if not _section(title) or re.search(r"\b(?:policy|classification|guidelines?)\b", title, re.IGNORECASE):
        return True
    return all(other > level for _, other in heads[1:]) and len(heads) > 1


def _example(rule: Rule, text: str, answer: str, piece: Piece) -> list[Entry]:
    is_unsafe = _is_unsafe(answer)
    said = text.strip().strip('"\u201c\u201d').strip()
    if is_unsafe is None or not said:
        return [Entry(piece)]
    (rule.examples if is_unsafe else rule.allowed_examples).append((said, piece))
    return []


def _is_unsafe(answer: str) -> bool | None:
    """What an expected answer says; None where nobody knows."""
    said = answer.strip().strip("`")
    if said.startswith("{"):
        try:
            data = json.loads(said)
        except (ValueError, RecursionError):
            return None
        for key in (
            "violation",
            "violates",
            "label",
            "answer",
            "verdict",
            "classification",
            "unsafe",
            "safe",
        ):
            if isinstance(data, Mapping) and key in data:
                return _is_unsafe(f"{key}: {data[key]}") if not isinstance(data[key], Mapping) else None
        return None
    said = _KEY.sub("", said)
    if found := _QUESTION.match(said):
        is_yes = _is_unsafe(found["answer"])
        return None if is_yes is None else not is_yes
    if plainly := _YES_NO.match(said):
        other = _REFUSED if plainly["said"].casefold() == "no" else _PERMITTED
        if other.search(plainly["rest"]):
            return None
    if _SAFE.match(said):
        return False
    return True if _UNSAFE.match(said) else None


def _section(title: str) -> str:
    if _SECTIONS["examples"].search(title):
        return "examples"
    named = [(name, found) for name, form in _SECTIONS.items() if (found := form.search(title))]
    first = next((name for name, found in named if not re.search(r"[^\W\d]", title[: found.start()])), "")
    # Prohibited outputs are prohibited, and no instruction on the output.
    return first or _SAID.get(polarity(title), "") or next((name for name, _ in named), "")
