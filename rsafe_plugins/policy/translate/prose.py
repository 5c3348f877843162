"""Rules written as sentences: what is forbidden, what is allowed, and what must be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule, capital

BULLET = re.compile(
    r"^\s*(?:[-*+\u2022\u2013\u2014\u25cf\u25e6\u25aa\u2023\u00b7]|\(?\d{1,3}[.)]|\(?[a-z]\))\s+(?=\S)"
)
Says = Literal["", "forbids", "allows", "demands", "unsure"]

_APOSTROPHE = "['\u2019]"
_SUBJECT = (
    r"(?:(?:the\s+)?(?:users?|(?:chat)?bots?|assistants?|(?:ai\s+)?models?|agents?|ai|employees?|customers?)?"
    rf"(?:{_APOSTROPHE}s|s{_APOSTROPHE})?\s*)"
)
_CONTENT = (
    r"(?:messages?|responses?|answers?|outputs?|inputs?|content|requests?|queries|texts?|posts?|comments?)"
)
_WHAT = rf"(?:(?:{_CONTENT}|it|they|you|we|everyone|anyone)\s+)?"
_NOT = (
    r"(?:(?:should|must|may|can|could|shall|will|would|do|does)\s+(?:not|never)|cannot|"
    rf"(?:ca|wo|sha|must|should|could|would|do|does)n{_APOSTROPHE}?t|never|refuse\s+to|"
    rf"(?:(?:is|are)\s+(?:not|never)|(?:is|are)n{_APOSTROPHE}?t|not)\s+(?:allowed|permitted|supposed)\s+to|"
    r"(?:is|are)\s+(?:forbidden|prohibited)\s+to)"
)
_OK = r"(?:ok(?:ay)?|fine|allowed|acceptable|permitted|appropriate)"
_IS = rf"(?:is|are|it{_APOSTROPHE}s)"
_IS_NOT = rf"(?:{_IS}\s+(?:not|never)|(?:is|are)n{_APOSTROPHE}?t)"
_BANNED = r"(?:forbidden|prohibited|banned|disallowed|unacceptable|off[\s-]+limits)"
_BLOCKED = r"(?:blocked|rejected|refused|flagged|declined|denied)"
_BLOCK = r"(?:block|reject|refuse|flag|forbid|ban|decline|censor)"
_BLOCKING = r"(?:blocking|rejecting|refusing|flagging|forbidding|banning|declining|censoring)"
_REST = r"\b(?P<rest>.*)$"


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_NEGATED_BAN = _form(
    rf"^(?:(?P<what>.+?)\s+)?(?:{_IS_NOT}\s+(?:{_BANNED}|{_BLOCKED})|"
    rf"(?:(?:should|must|need|shall|will|may|can)\s+(?:not|never)|cannot|(?:should|must|need|wo|ca)n{_APOSTROPHE}?t)"
    rf"\s+be\s+(?:{_BANNED}|{_BLOCKED})){_REST}"
)
_NOTHING_BANNED = _form(rf"^(?:nothing|no\s+\w+)\s+(?:is|are)\s+(?:{_BANNED}|{_BLOCKED}){_REST}")
_NEED_NOT_BLOCK = _form(
    rf"^(?:please\s+)?(?:(?:there\s+is\s+)?no\s+need\s+to|do\s+not|don{_APOSTROPHE}?t|never)\s+{_BLOCK}\s+(?P<what>.+)$"
)
_NOT_UNSAFE = _form(
    rf"^(?:please\s+)?(?:(?:there\s+is\s+)?no\s+need\s+to|do\s+not|don{_APOSTROPHE}?t|never)\s+"
    r"(?:mark|label|classify|count|consider|treat|regard|see)\s+(?P<what>.+?)\s+(?:as|to\s+be)\s+(?:a\s+|an\s+)?"
    r"(?:unsafe|harmful|inappropriate|toxic|violations?|violating|forbidden|not\s+(?:safe|allowed))$"
)
_NOT_OK_TO = _form(
    rf"^(?:(?:it|this|that)\s+)?(?:{_IS_NOT}\s+{_OK}|not\s+{_OK}|(?:it{_APOSTROPHE}s|is)\s+{_BANNED})"
    r"\s+(?:for\s+\w+\s+)?to\s+(?P<what>.+)$"
)
_FORBIDS = _form(rf"^(?:please\s+)?{_SUBJECT}{_WHAT}{_NOT}\s+(?:ever\s+)?(?P<what>\S.*)$")
_NOBODY_MAY = _form(
    rf"^(?:nobody|no\s+one|no\s+(?:users?|bots?|{_CONTENT}))\s+(?:may|can|should|must|shall)\s+(?P<what>.+)$"
)
_NONE_ALLOWED = _form(rf"^no\s+(?P<what>.+?)\s+(?:is|are)\s+{_OK}{_REST}")
_FORBIDDEN = _form(
    rf"^(?P<what>.+?)\s+(?:(?:{_IS}\s+)?(?:strictly\s+)?{_BANNED}|{_IS_NOT}\s+(?:{_OK}|tolerated)){_REST}"
)
_LISTED = _form(rf"^(?:not\s+{_OK}|{_BANNED})\s*:\s*(?P<what>.+)$")
_TO_BLOCK = _form(
    r"^(?P<what>.+?)\s+"
    r"(?:(?:must|should|shall|will|may|can|might|needs?\s+to|ha(?:ve|s)\s+to|(?:is|are)\s+to)\s+(?:always\s+)?be|"
    rf"(?:is|are)(?:\s+always)?)\s+(?:{_BLOCKED}|{_BANNED}){_REST}"
)
_WITHOUT = _form(
    r"^(?:please\s+)?(?:avoid|refrain\s+from|no|zero\s+tolerance\s+for|keep\s+away\s+from)\s+(?P<what>.+)$"
)
_BLOCKS = _form(
    rf"^(?:please\s+|always\s+)?{_BLOCK}\s+\S|^(?:if|when)\b.*\b(?:then|,)\s*(?:please\s+)?{_BLOCK}\b"
)
_BLOCKS_IF = _form(rf"\b{_BLOCK}\b.*\b(?:if|when|that|which)\b.*:\s*$")
_SHOULD_BE_OK = rf"(?:should|must|shall)\s+(?:always\s+)?be\s+{_OK}"
_ALLOWED = _form(rf"^(?P<what>.+?)\s+(?:{_IS}\s+(?:always\s+)?{_OK}|{_SHOULD_BE_OK}){_REST}")
_ALLOWS = _form(
    rf"^(?:{_SUBJECT}{_WHAT}(?:may|can|(?:is|are|(?:should|must|shall)\s+be)\s+(?:able|allowed|permitted|free|welcome)"
    r"\s+to|feel\s+free\s+to)|"
    rf"it(?:{_APOSTROPHE}s|\s+is)?\s+{_OK}(?:\s+(?:to|for|if|that|when))?|"
    rf"{_OK}\s*:?(?:\s+to)?)(?:\s+|(?<=:))(?P<what>\S.*)$"
)
_MUST = _form(r"\b(?:should|must|shall|needs?\s+to|has\s+to|have\s+to|always|only)\b")
_NEGATES = _form(
    rf"\b(?:not|never|cannot|nobody|forbid\w*|prohibit\w*|ban(?:s|ned)?|disallow\w*|unacceptable|tolerate[sd]?)\b|"
    rf"n{_APOSTROPHE}t\b"
)
_FORBIDS_WITHIN = _form(
    rf"\b(?:(?:must|should|may|shall)\s+(?:not|never)|(?:must|should)n{_APOSTROPHE}t|never|not\s+{_OK}|{_BANNED})\b"
)
# With one of these, a permission says more than that something is allowed.
_DOUBT = _form(
    rf"\b(?:but|only|never|unless|except\w*|however|although|though|(?:as|so)\s+long\s+as|must|cannot|"
    rf"(?:should|may|can|shall|will|do|does|is|are)\s*not|not|no|none|nobody|nothing|neither|nor|apart\s+from|"
    rf"excluding|besides|other\s+than|{_BANNED}|{_BLOCKED})\b|n{_APOSTROPHE}t\b|[.!?;]\s+\S|"
    rf"(?:^|[,:]\s*)(?:please\s+|always\s+)?{_BLOCK}\b"
)
# With one of these, a prohibition says more than that something is forbidden.
_MORE = _form(
    rf"\b(?:but|however|although|though|may|must|should|(?:is|are)\s+{_OK})\b|[.!?;]\s+[A-Z\"']|^(?:only|just)\b|"
    r"^(?:hesitate|be\s+afraid|worry|mind|need|have\s+to)\b"
)
# A list is to follow.
_OPEN = _form(
    r"\b(?:about|of|for|with|to|in|on|any|allow|permit|contain|include|the|following|(?:these|those)(?:\s+\w+)?)$"
)
_NO_THING = _form(
    r"^(?:if|when|whenever|unless|because|it|this|that|these|those|they|there|what|not|nothing|none|no|one|need|"
    r"problem\w*|restriction\w*|exceptions?|(?:issues?|problems?)\s+with|harm\s+in|limits?\s+(?:on|to)|reasons?\s+to|"
    r"objections?|"
    rf"everything|anything|users?|bots?|(?:the|a|an)\s+(?:users?|bots?|{_CONTENT})$|{_CONTENT}$)\b"
)
_MESSAGES = _form(
    rf"^(?:(?:any|all)\s+)?{_CONTENT}\s+(?:(?:that|which)\s+(?:(?:contain|include|use|share|have)s?\s+)?|"
    r"(?:with|containing|about)\s+)(?:any\s+)?"
)
# "Users may try to trick it" says what happens, and allows nothing.
_HAPPENS = _form(
    r"^(?:(?:try|tries|attempt)\s+to\b(?!\s+(?:answer|help|explain|assist))|cause|lose|harm|hurt|pose|lead|result|seem|"
    r"appear|abuse|spam|trick|jailbreak|get\s+(?:banned|blocked|suspended|flagged)|"
    r"(?:contain|include|depict)\s+(?:graphic|violen|sexual|explicit|hate|slur|instruction|build|detail)\w*|"
    r"be\s+(?:unsafe|harmful|dangerous|illegal|spam|abusive|flagged|reported|suspended|removed|deleted|banned|punished|"
    r"tricked|abused))\b|\b(?:is|as)\s+(?:a\s+)?violations?\b|[:,]\s*flag\b|"
    r"\b(?:say|answer|respond|reply|return|output)\s+(?:with\s+)?\W?(?:yes|unsafe)\b"
)
# What a ban ends in that is none: "jokes are no longer", "sarcasm does not need to be".
_NEGATED_END = _form(
    rf"(?:\s+(?:do|does|is|are|has|have|need))?(?:\s+(?:not|never|no\s+longer|hardly|in\s+no\s+way)|n{_APOSTROPHE}t)"
    r"(?:\s+(?:need|have|has)\s+to)?$"
)
# Words of a permission or a duty, in a line that has no form of one: nobody knows what it does.
_ORDER = _form(
    r"^(?:please\s+|always\s+)?(?:respond|answer|reply|keep|use|encourage|greet|speak|stay|remain|ensure|make\s+sure|"
    r"allow|accept|permit|let|tolerate|pass|welcome)\s+(?!of\b|for\b|and\b|or\b)"
    r"(?!.*\b(?:violen|slur|hate|abus|harm|self|insult|malware|illegal|brib|crime|drug|weapon|threat)\w*)"
)
# That something is allowed, in other languages.
ALLOWED_ELSEWHERE = (
    r"\b(?:erlaubt\w*|gestattet\w*|zul\u00e4ssig\w*|d\u00fcrfen|autoris\u00e9\w*|permis(?:e|es)?|permitid[oa]s?|"
    r"consentit[oaie])\b"
)
_PERHAPS_OK = _form(
    rf"\b(?:{_IS}|fully|perfectly|always|we)\s+(?:[a-z]+\s+)?(?:welcome|tolerated?|safe|ok(?:ay)?|fine|accepted|allowed|"
    rf"permitted)\b|\b(?:may|can)\s*,|\b(?:don{_APOSTROPHE}?t|do\s+not)\s+mind\b|{ALLOWED_ELSEWHERE}"
)
# What is good about a message, or what the application is for: the opposite of what is forbidden.
_GOOD = _form(
    r"^(?:it\s+)?(?:is\s+(?:factual\w*|accurate|consistent|free\s+of|polite|respectful|relevant|helpful)|"
    r"(?:complies|comply)\s+with|(?:contains?|has|includes?)\s+no|free\s+of)\b|"
    r"^(?:the\s+|our\s+)?(?:(?:chat)?bot|assistant|(?:ai\s+)?model|agent|service)\s+"
    r"(?:helps?|assists?|supports?|answers?|provides?|handles?)\b|"
    r"\b(?:is|are)\s+(?:not|no)\s+(?:an?\s+)?violations?$"
)
_PEOPLE = _form(
    r"^(?:the\s+|all\s+|any\s+)?(?:\w+\s+)?(?:users?|customers?|people|persons?|somebody|someone|anyone|women|men|"
    r"children|minorities|immigrants|groups?|others|them|employees?|members?)\b(?!['\u2019])"
)
_BE = _form(r"^(?:please\s+|always\s+)?be\s+\w")
_ALL = _form(r"^(?:everything|anything|all)\b(?!\s+(?:kinds|sorts)\b)")


def add_sentence(
    draft: Draft, piece: Piece, *, says: Says = "", lead: str = "", text: str = ""
) -> list[Entry]:
    """Adds a rule that is written as a sentence.

    A prohibition becomes a category, a permission an exception of all of the draft's categories, and a duty a category
    that holds what breaks it. So does a sentence that is more than one of them: it is kept whole.

    Args:
        draft: Where it goes.
        piece: The sentence.
        says: What its heading says of what follows; empty where the sentence must say it itself.
        lead: How the heading begins the sentence, such as `Users may not:`.
        text: What of the piece is the sentence; all of it, unless given.

    Returns:
        What is no rule, or where nobody knows whether it forbids or allows.
    """
    text = _plain(text or piece.text)
    if not text:
        return [Entry(piece, reason="a line without words")]
    form, what = _reading(text)
    if form == "allows" and says == "forbids" and not re.search(_SHOULD_BE_OK, text, re.IGNORECASE):
        form = "whole"  # they contradict each other
    whole = f"{lead} {text}".strip()
    if form == "unknown" or (says in ("", "unsure") and _GOOD.search(text)):
        return [Entry(piece)]
    if form == "does":
        draft.rules.append(_forbidden(what, piece))
    elif form == "has":
        draft.rules.append(_unwanted(what, piece))
    elif form == "allows":
        draft.exceptions.append((what, piece))
    elif form == "whole":
        draft.rules.append(_whole(text, text, piece))
    elif says == "allows":
        if _DOUBT.search(text):
            draft.rules.append(_whole(text, f"this is allowed: {text}", piece))
        else:
            draft.exceptions.append((text, piece))
    elif says == "unsure":
        return [Entry(piece)]
    elif says == "forbids" and _BLOCKS_IF.search(lead):
        draft.rules.append(Rule(capital(text), piece, description=f"{capital(text)}."))
    elif says == "demands" or (says == "forbids" and lead):
        draft.rules.append(_whole(text, whole, piece))
    elif (form == "demands" or _BE.match(text)) and not says:
        draft.rules.append(_whole(text, text, piece))
    elif not says and (_ORDER.match(text) or _PERHAPS_OK.search(text)):
        return [Entry(piece)]
    else:
        draft.rules.append(Rule(capital(text), piece))
    return []


def is_rule(text: str) -> bool:
    """Whether a sentence without a bullet forbids, allows or demands something."""
    line = text.strip()
    if line.endswith("?") or "{{" in line:
        return False  # asks the model that judges, or shows it what is judged
    return bool(_reading(_plain(line))[0])


def is_whole_rule(text: str) -> bool:
    """Whether a sentence says itself what it forbids, and no list below it does."""
    form, what = _reading(_plain(text))
    if text.rstrip().endswith(":") or form not in ("does", "has") or _OPEN.search(what):
        return False
    return form == "has" or " " in what


def forbids_something(text: str, *, strictly: bool = False) -> bool:
    """Whether a sentence forbids something; strictly, if it does nothing else."""
    line = _plain(text)
    form = _reading(line)[0]
    if strictly or form != "demands":
        return form in (("does", "has") if strictly else ("does", "has", "whole"))
    return bool(_FORBIDS_WITHIN.search(line))


def only_happens(what: str) -> bool:
    """Whether what somebody may do is no permission, but what goes wrong: "Users may try to trick it"."""
    return bool(_HAPPENS.search(what))


def _plain(text: str) -> str:
    return BULLET.sub("", " ".join(text.split())).strip('" ').rstrip(" .;!")


def _reading(text: str) -> tuple[str, str]:
    """What a sentence does, and to what.

    `does` and `has` forbid, `allows` allows, `demands` demands or is not understood, `whole` does several of it.
    """
    if found := _NEGATED_BAN.match(text):
        what, rest = found["what"] or "", found["rest"].strip()
        if re.match(r"(?:it|this|that)\Z", what, re.IGNORECASE) and rest.startswith("to "):
            return _permission(rest[3:])
        return _permission(rest if _NO_THING.match(what) and rest else f"{what} {rest}".strip())
    if found := _NOTHING_BANNED.match(text):
        return _permission(text, "but" if not found["rest"].strip() else found["rest"])
    if found := _NEED_NOT_BLOCK.match(text):
        return _permission(re.sub(r"^to\s+", "", found["what"]))
    if found := _NOT_UNSAFE.match(text):
        # "Do not treat women as harmful" says how to speak of them, and excuses nothing.
        return ("unknown", text) if _PEOPLE.search(found["what"]) else _permission(found["what"])
    if found := _NOT_OK_TO.match(text) or _FORBIDS.match(text) or _NOBODY_MAY.match(text):
        what = found["what"]
        if re.match(rf"{_BLOCK}\b", what, re.IGNORECASE) or _MORE.search(what):
            return "whole", text
        if allowed := re.match(
            r"(?:allow|permit|tolerate|accept)\s+(?!\w+\s+to\b)(?P<what>.+)", what, re.IGNORECASE
        ):
            return "has", allowed["what"]
        return "does", what
    if found := (
        _LISTED.match(text)
        or _NONE_ALLOWED.match(text)
        or _FORBIDDEN.match(text)
        or _TO_BLOCK.match(text)
        or _WITHOUT.match(text)
    ):
        what, rest = found["what"], found.groupdict().get("rest", "") or ""
        if negated := _NEGATED_END.search(what):
            return ("unknown", text) if rest.strip() else _permission(what[: negated.start()])
        if let := re.match(rf"{_BLOCKING}\s+(?P<what>.+)", what, re.IGNORECASE):
            is_doing = let["what"].startswith("to ") or _PEOPLE.search(let["what"])
            return ("unknown", text) if is_doing else _permission(let["what"])
        if rest.strip() or _NO_THING.match(what) or _MORE.search(what) or _is_ok(what):
            return "whole", text
        return "has", what
    if _BLOCKS.match(text):
        return "whole", text
    if found := _ALLOWS.match(text):
        if only_happens(found["what"]):
            return "unknown", text
        # What may be done to somebody is nothing without who it is.
        return _permission(text if found["what"].startswith("be ") else found["what"])
    if found := _ALLOWED.match(text):
        what, rest = found["what"], found["rest"].strip()
        if _ALL.match(what) and not rest:
            return "unknown", text  # nobody means by it that nothing is forbidden
        if re.match(r"if\b|when\b", what, re.IGNORECASE):
            return "demands", text
        return _permission(f"{what} {rest}".strip(), "but" if _NO_THING.match(what) else f"{what} {rest}")
    return ("demands", text) if _MUST.search(text) or _NEGATES.search(text) else ("", text)


def _permission(what: str, doubtful: str | None = None) -> tuple[str, str]:
    is_doubtful = _DOUBT.search(what if doubtful is None else doubtful) or _ALL.match(what)
    return ("whole" if is_doubtful else "allows"), what


def _is_ok(what: str) -> bool:
    return bool(re.search(rf"\b{_IS}\s+{_OK}\b", what, re.IGNORECASE))


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
    found: list[tuple[list[str], int, int]] = []
    indent = -1
    for number, line in enumerate(text.splitlines(), first):
        stripped = line.strip()
        wide = line.expandtabs(4)
        depth = len(wide) - len(wide.lstrip())
        is_bullet = bool(BULLET.match(line))
        if stripped and not is_bullet and 0 <= indent < depth:
            found[-1][0].append(stripped)
            continue
        indent = depth if is_bullet else -1
        if stripped:
            found.append(([stripped], number, depth))
    return [Piece(" ".join(parts), file, number, key, depth) for parts, number, depth in found]


def unwrapped(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with prose that runs over several lines made one piece."""
    found: list[list[Piece]] = []
    for piece in pieces:
        before = found[-1][-1] if found else None
        if (
            before is not None
            and piece.line == before.line + 1
            and not BULLET.match(found[-1][0].text)
            and not BULLET.match(piece.text)
            and before.text[-1] not in ".!?:;|=-*"
            and before.text[0] not in "#|<{"
            and _runs_on(before.text, piece.text)
            and not (forbids_something(piece.text) and (piece.text[0].isupper() or is_rule(before.text)))
        ):
            found[-1].append(piece)
        else:
            found.append([piece])
    return [
        Piece(
            " ".join(one.text for one in group), group[0].file, group[0].line, group[0].key, group[0].indent
        )
        for group in found
    ]


def _runs_on(line: str, following: str) -> bool:
    if following[0].islower():
        return len(line) > 40 or bool(_MUST.search(line) or _NEGATES.search(line))
    return len(line) > 60 and following[0].isalnum()


def bullets(pieces: Iterable[Piece]) -> list[Piece]:
    """Those pieces that are bullets."""
    return [piece for piece in pieces if BULLET.match(piece.text)]


def _unwanted(what: str, piece: Piece) -> Rule:
    """A rule about a thing."""
    if found := _MESSAGES.match(what):
        name = what[found.end() :] or what
        return Rule(capital(name.split(",")[0]), piece, description=f"{capital(what)}.")
    thing = what if what[:2].isupper() else what[:1].lower() + what[1:]
    return Rule(capital(what.split(",")[0]), piece, description=f"Messages with {thing}.")


def _forbidden(what: str, piece: Piece) -> Rule:
    """A rule about what a message does."""
    name = re.sub(r"^(?:contain|include|use|share|have)\s+(?:any\s+)?", "", what, flags=re.IGNORECASE)
    return Rule(capital(name.split(",")[0]), piece, description=f"Messages that {what}.")


def _whole(name: str, text: str, piece: Piece) -> Rule:
    return Rule(capital(name), piece, description=f"What breaks this rule: {text}.")
