"""Policies as plain text or markdown: bullets under headings, or rules line by line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule, capital
from rsafe_plugins.policy.translate.prose import (
    ALLOWED_ELSEWHERE,
    BULLET,
    Says,
    add_sentence,
    is_rule,
    is_whole_rule,
    sentences,
    unwrapped,
)

_HASHES = re.compile(r"\s{0,3}(?P<hashes>#{1,6})\s+(?=[^\s#])")
_LINE = re.compile(r"(?:={3,}|-{3,}|_{3,}|\*{3,})\s*$")
_MOST_TITLE = 120
_BOLD_LEVEL = 7


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_GOOD = _form(
    r"\b(?:allow\w*|permit\w*|permissible|acceptable|accepted|approved|ok(?:ay)?|fine(?!-)|exceptions?|do'?s|"
    r"in[\s-]scope|free\s+to|let\s+through|should\s+pass|answer\s+questions\s+about)\b|"
    # What is "supported by terrorists" or "encouraged by extremists" is something else.
    r"^\W*(?:supported|harmless|legitimate|benign|whitelist\w*|pass\s+(?:it|the\s+message|messages?))\b|"
    r"^\W*(?:always\s+)?(?:welcome|encouraged|tolerated)\W*$|"
    r"\b(?:may|can)\s*:?\s*$|\bcan\s+(?:help|assist|answer|discuss|talk)\b|"
    r"^(?:what\s+)?(?:the\s+)?(?:users?|bots?|you|we|they|messages?|assistants?|models?)\s+(?:may|can)\b"
    r"(?!\s+(?:try|attempt|lose|get|cause|contain|include|harm)\b)"
)
_SAFE = _form(
    r"^\W*safe\s*(?:\([^)]*\))?\W*$|"
    r"^(?:.*\s)?\W*safe\s+(?:contents?|messages?|topics?|examples?|requests?|questions?|inputs?|outputs?)\b[^.]*$"
)
_BAD = _form(
    r"\b(?:forbid\w*|prohibit\w*|disallow\w*|banned|bans?|unsafe|violat\w+|block\w*|refus\w+|reject\w*|restrict\w*|"
    r"unacceptable|don['\u2019]?ts|flag(?:ged)?|suspend\w*|removed|delet\w+|punish\w*|"
    r"(?:to|for)\s+remov\w+|report(?:ed|able)|filter(?:ed)?|"
    r"censor\w*|abus\w+|wrong|harm(?!less)\w*|illegal|avoid\w*|zero|den(?:y|ied))\b"
)
_NEGATION = _form(
    r"\b(?:not|never|no|none|neither|nobody|non(?=[\s-]*violat)|cannot|nothing)\b|n['\u2019]t\b|"
    r"\b(?:dont|cant|isnt|arent|wont|hardly|rarely|seldom|scarcely|nowhere)\b"
)
_ELSEWHERE = _form(ALLOWED_ELSEWHERE)
# Beside a word that allows, these may take it back, or make it wider: "far from acceptable", "allowed without limits".
_TAKES_BACK = _form(r"\b(?:lack\w*|without|far\s+from|beyond|exclud\w+)\b")
_EXCEPT = _form(r"\b(?:except|unless|other\s+than|apart\s+from)\b")
_MUST = _form(r"\b(?:should|must|shall|needs?\s+to|ha(?:s|ve)\s+to|always|required?)\b|^\W*do\W*$")
_ONLY = _form(r"\b(?:only|just|solely|exclusively)\b")
_SAY = r"\b(?:answer|respond|reply|say|output|return)\s+(?:only\s+)?(?:with\s+)?[\"'\u201c]?"
_BY_SAYING = r"\bby\s+(?:saying|answering|responding|replying|returning)\b"
_SAYS_NO = _form(rf"{_SAY}(?:no|safe|false|0)\b")
_RULES = _form(r"\b(?:polic(?:y|ies)|rules?|guidelines?)\b")
_JUDGE = _form(
    r"^(?:your\s+(?:task|job|role)\s+(?:is|will)\b|"
    r"your\s+(?:answer|response|reply|output)\s+(?:must|should|shall|will|can|may)\b.*\b(?:yes|no|safe|unsafe|json|words?)\b|"
    r"(?:please\s+)?(?:only\s+|always\s+)?(?:answer|respond|reply|say|output|return)\b.*"
    r"\b(?:yes|no|safe|unsafe|json|words?|only|true|false)\b|"
    r"(?:please\s+)?(?:do\s+not|don['\u2019]?t|never)\s+(?:explain|justify|elaborate|"
    r"(?:provide|give|add|include|output)\s+(?:an\s+|any\s+|your\s+)?(?:explanations?|reason\w*|anything|other))\b|"
    r"(?:if|when)\b.*\b(?:answer|respond|reply|output|return|say)\s+(?:only\s+)?(?:with\s+)?"
    r"[\"'\u201c]?(?:yes|no|safe|unsafe|block|allow|true|false|0|1)\b|"
    rf"(?:if|when)\b.*\b(?:block|allow)\b.*{_BY_SAYING}|treat\s+(?:the|these)\b.*\bconditions\s+as\b)"
)


_UNSAFE = r"[\"'\u201c]?(?:yes|unsafe|block(?:ed)?)\b[\"'\u201d]?"
_UNSAFE_IF = _form(
    rf"^(?:please\s+)?{_SAY}{_UNSAFE}[,\s]+(?:if|when|whenever|where|for)\s+(?P<what>\S.*?)[.\s]*$"
)
_IF_BLOCKED = _form(
    rf"^(?:if|when|whenever)\s+(?P<what>\S.*?),\s+(?:then\s+)?(?:you\s+)?(?:(?:should|must)\s+)?block\b.*{_BY_SAYING}"
)
_IF_UNSAFE = _form(rf"^(?:if|when|whenever)\s+(?P<what>\S.*?),?\s+(?:then\s+)?{_SAY}{_UNSAFE}[.\s]*$")
# A condition of these words alone says no more than that the rules are broken.
_BY_THE_RULES = frozenset(
    re.findall(
        r"\S+",
        """
    a above acceptable according all allowed an and any appropriate are as ask asks at be because
    below block blocked bot break breaks by categories category company compliance compliant
    complies comply condition conditions contain contains content conversation criteria criterion do
    does doesn don falls following for from given goes guideline guidelines harmful human if in
    inappropriate input instructions is isn it its last latest least listed meets message met moderation
    more my not of ok on one or our output permitted policies policy prompt query question refused
    rejected request response rule rules s safe safety security should so statement t terms text
    that the them these this those to under unsafe usage user user's violate violated violates violating
    violation violations was way with would you your
        """,
    )
)
_BREAKS_THE_RULES = _form(
    r"\b(?:violat\w*|break\w*|compl(?:y|ies|iant)|against|falls?|meets?|listed)\b.*"
    r"\b(?:polic(?:y|ies)|rules?|guidelines?|above|below|categor(?:y|ies)|criteria|conditions?|terms)\b"
)
_SOUNDS_LIKE_A_RULE = _form(
    r"^\||\banswer\s+(?:is|must\s+be|should\s+be)\s+[\"'\u201c]?(?:yes|no|safe|unsafe|block)\b|"
    r"\b(?:is|are|be|as|counts?)\s+(?:(?:considered|treated|regarded|classified|marked|always|as|a|an|to|be)\s+)*"
    r"(?:unsafe|violations?|harmful|toxic)\b"
)
_ASKS_WHETHER = _form(r"\b(?:whether|determine|decide|judge|assess|evaluate)\b|^(?:please\s+)?check\b")


def heading(line: str) -> tuple[str, int] | None:
    """A markdown heading's title and level; bold lines are the deepest."""
    if found := _HASHES.match(line):
        return line[found.end() :].rstrip().rstrip("#").rstrip(), len(found["hashes"])
    bold = line.strip().removesuffix(":").rstrip()
    if len(bold) > 4 and bold.startswith("**") and bold.endswith("**") and "*" not in bold[2:-2]:
        return bold[2:-2].strip(), _BOLD_LEVEL
    return None


def polarity(title: str) -> Says:
    """What a heading says of what stands under it; a negated one forbids."""
    line = " ".join(title.split())
    is_good = bool(_GOOD.search(line) or _SAFE.match(line))
    is_bad = bool(_BAD.search(line))
    negations = len(_NEGATION.findall(line))
    is_reversed = bool(_EXCEPT.search(line))
    if negations > 1 or (is_good and is_bad) or _SAYS_NO.search(line) or _ELSEWHERE.search(line):
        return "unsure"
    if is_good and _TAKES_BACK.search(line):
        return "unsure"
    if is_good and not negations and not is_reversed and _ONLY.search(line):
        return "demands"  # what it doesn't allow is forbidden
    if is_good and not negations and not is_reversed and _RULES.search(line):
        return ""  # an acceptable use policy says what is not acceptable
    if is_good or is_bad:
        flips = negations + is_reversed
        return "allows" if is_good == (flips % 2 == 0) else "forbids"
    if negations:
        return "allows" if is_reversed else "forbids"
    if is_reversed:
        return "allows"
    return "demands" if _MUST.search(line) else ""


def read(draft: Draft, pieces: Sequence[Piece], *, judge: bool = False) -> list[Entry]:
    """Adds bullets, and lines that forbid, allow or demand something.

    Args:
        draft: Where they go.
        pieces: The lines.
        judge: Whether they are a prompt, in which a model that judges is told what to answer.

    Returns:
        What is none of them.
    """
    others: list[Entry] = []
    says: Says = ""
    lead = ""
    seen = False  # a bullet in this section
    # Bullets that end with a colon: their indent, what they say, how they begin, and the rule they are.
    nested: list[tuple[int, Says, str, int | None]] = []
    pieces = [part for piece in unwrapped(pieces) for part in _parts(piece, judge)]
    has_bullets = any(BULLET.match(piece.text) for piece in pieces)
    for number, piece in enumerate(pieces):
        following = pieces[number + 1] if number + 1 < len(pieces) else None
        is_bullet = bool(BULLET.match(piece.text))
        if _LINE.match(piece.text):
            others.append(Entry(piece, reason="a line between sections"))
            continue
        if is_bullet:
            while nested and piece.indent <= nested[-1][0]:
                nested.pop()
            _, inner, begins, at = nested[-1] if nested else (0, says, lead, None)
            seen = True
            if piece.text.rstrip().endswith(":"):
                found, entries = _introduction(draft, piece, inner, begins)
                others += entries
                nested.append((piece.indent, *found))
            elif at is not None and inner == "allows":
                draft.rules[at].allows.append((_bare(piece.text), piece))
            else:
                others += add_sentence(draft, piece, says=inner, lead=begins)
            continue
        nested.clear()
        if (title := _title(piece, following)) is not None:
            says, lead, seen = polarity(title), title if title.endswith(":") else "", False
            if says == "demands":
                lead = title
            others.append(Entry(piece, reason="a heading"))
            continue
        if judge and _JUDGE.match(piece.text):
            if condition := _condition(piece.text):
                draft.rules.append(Rule(condition, piece, description=f"{condition}."))
            else:
                others.append(Entry(piece, reason="an instruction to the model that judges"))
        elif is_rule(piece.text):
            # Between bullets a rule is one by its own words; without any, its heading may say what it is.
            others += add_sentence(draft, piece, says="" if has_bullets else says)
            if has_bullets:
                says, lead = "", ""
        else:
            # Under a heading that forbids or allows, and no bullet: nobody knows whether it belongs there.
            is_unknown = bool(says) and not judge and not _bullets_below(pieces[number:])
            is_place = judge and "{{" in piece.text
            is_unknown = is_unknown or (says == "forbids" and not is_place) or _sounds_like_a_rule(piece.text)
            reason = "" if is_unknown else "neither forbids, allows nor demands anything"
            others.append(Entry(piece, reason=reason))
            if seen and says == "allows":
                says = "unsure"
    return others


def _sounds_like_a_rule(text: str) -> bool:
    """Whether a line may forbid something in a way that isn't understood; not one that asks whether something does."""
    is_question = text.rstrip().endswith("?") or "{{" in text or bool(_ASKS_WHETHER.search(text))
    return bool(_SOUNDS_LIKE_A_RULE.search(text)) and not is_question and not re.match(r"^\|[\s:|-]+$", text)


def _parts(piece: Piece, judge: bool) -> list[Piece]:
    """A line's sentences where some of them may be for the model that judges; else the line."""
    if (
        not judge
        or BULLET.match(piece.text)
        or not any(_JUDGE.match(sentence) for sentence in sentences(piece.text))
    ):
        return [piece]
    return [Piece(one, piece.file, piece.line, piece.key) for one in sentences(piece.text)]


def _condition(text: str) -> str:
    """For what the model that judges is told to say that it is unsafe; empty where that is the rest of the prompt."""
    line = text.strip()
    found = _UNSAFE_IF.match(line) or _IF_UNSAFE.match(line) or _IF_BLOCKED.match(line)
    if found is None:
        return ""
    what = re.sub(r",?\s+(?:otherwise|else)\b.*$", "", found["what"], flags=re.IGNORECASE | re.DOTALL)
    if _BREAKS_THE_RULES.search(what) or {*re.findall(r"[\w']+", what.casefold())} <= _BY_THE_RULES:
        return ""
    return capital(what.strip(" ,"))


def _bullets_below(pieces: Sequence[Piece]) -> bool:
    """Whether there are any before the next heading."""
    for piece in pieces:
        if BULLET.match(piece.text):
            return True
        if heading(piece.text):
            break
    return False


def _bare(text: str) -> str:
    return BULLET.sub("", text).strip().rstrip(" .;")


def _introduction(
    draft: Draft, piece: Piece, says: Says, lead: str
) -> tuple[tuple[Says, str, int | None], list[Entry]]:
    """What a bullet that ends with a colon says of those under it, and where itself goes."""
    text = " ".join(_bare(piece.text).split())
    own = polarity(text)
    if found := _EXCEPT.search(text):
        before = text[: found.start()].rstrip(" ,(")
        if before and is_rule(before):
            count = len(draft.rules)
            entries = add_sentence(draft, piece, says=says, lead=lead, text=before)
            is_one = len(draft.rules) == count + 1
            entries += [] if is_one or entries else [Entry(piece, reason="a heading")]
            inner: Says = "allows" if is_one else own
            return (inner, "" if is_one else text, count if is_one else None), entries
    if own:
        return (own, text, None), [Entry(piece, reason="a heading")]
    entries = add_sentence(draft, piece, says=says, lead=lead, text=text.rstrip(":"))
    return (says, lead, None), entries


def _title(piece: Piece, following: Piece | None) -> str | None:
    """What introduces the lines below it: a heading, or a short line with a colon, a line under it, or bullets."""
    if found := heading(piece.text):
        return found[0]
    text = piece.text.strip()
    if len(text) >= _MOST_TITLE:
        return None
    if text.endswith(":"):
        return text
    if is_whole_rule(text):
        return None
    if following is None or following.line - piece.line > 2:
        return None
    if _LINE.match(following.text) and following.line == piece.line + 1:
        return text
    is_short = len(text.split()) <= 8 and text[-1] not in ".!?,;"
    is_above = bool(BULLET.match(following.text))
    return text if is_short and is_above and polarity(text) and _incomplete(text) else None


def _incomplete(text: str) -> bool:
    return not is_rule(text) or not re.search(r"\b(?:is|are|must|should|may|can)\b.*\w+\s+\w", text)
