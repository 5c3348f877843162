r"""Keeps text under judgement from forging the prompt's structure: visibly, and so that it can be undone.

A mark (`¦`) is put inside whatever could end a section, open or close a thought, start a turn or fake a
verdict: `<think>` becomes `<¦think>`, `\boxed{` becomes `\¦boxed{`, `User:` at the start of a line becomes
`User¦:`. Marks that stand in the text already are doubled. Characters that engines can't take (controls, lone
surrogates) or that nobody can see (zero-width spaces, direction marks) are written as their number, `¦{0}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

MARK = "¦"

# What opens or closes something in a prompt of ours, or in the chat templates of the common model families:
# ChatML, Llama 2 to 4, Gemma, Mistral, Harmony, Phi, Qwen, DeepSeek, Granite, GLM, Nemotron, EXAONE, Seed, InternLM,
# MiniMax.
_TAGS = (
    "think|thinking|thought|reasoning|reflection|analysis|answer|"
    "s|bos|eos|unk|pad|mask|sep|cls|"
    "start_of_turn|end_of_turn|start_of_image|start_of_role|end_of_role|"
    "im_start|im_end|im_sep|endoftext|"
    "system|user|assistant|agent|human|developer|tool|function|instructions?|policy|"
    r"filename|reponame|unused\d+|sop|eop|eod|eot|"
    "tools?_calls?|tools?_responses?|tools?_results?|function_calls?|function_results?|guardian"
)
_BRACKETS = (
    "INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|THINK|"
    r"PREFIX|SUFFIX|MIDDLE|IMG\w*+|BOS|EOS|g?MASK|CLS|SEP|PAD|UNK|UNUSED_TOKEN_\d++"
)
_ROLES = (
    "user|agent|assistant|system|human|ai|bot|model|developer|tool(?: (?:call|result))?|document|function|"
    "ipython|query|categories|policy|verdict|judge"
)

# Controls and lone surrogates, which engines can't take; and what is invisible and could hide inside a word:
# soft hyphen, zero-width characters but the two joiners that scripts need, direction marks, fillers, tag characters,
# and what chooses a form of the character before it, except of signs and digits, where emoji need it.
_UNTYPEABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
    r"|(?<![#*0-9\xa9\xae\u200d\u203c-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f]"
)
_MARKED = re.compile(rf"{MARK}{MARK}|{MARK}\{{([0-9a-f]+)\}}|{MARK}")

_GAP = r"[\s\u200c\u200d]*+"
_LINE_END = r"\n\r\u2028\u2029"


@lru_cache(maxsize=64)
def _structure(delimiters: tuple[str, ...]) -> re.Pattern[str]:
    """One character that begins a structure, seen with what follows it.

    The quantifiers are possessive, so that no text makes the search slower than linear.
    """
    own = [(delimiter[0], _loosely(delimiter[1:])) for delimiter in delimiters if len(delimiter) > 1]
    follows = {
        "<＜": rf"[|｜]|{_GAP}[/／]?+{_GAP}(?:(?:{_TAGS})\b|(?:begin|end)[\s_\-]|[a-z0-9]++(?:[_:][a-z0-9]++)++[>＞])"
        rf"|<{_GAP}[/／]?+{_GAP}SYS\b",
        "|｜": r"[>＞\]]",
        "[": rf"[|｜]|e~|{_GAP}/?+{_GAP}(?:{_BRACKETS}){_GAP}\]",
        "]": "~",
        "\\＼": rf"{_GAP}f?box",
    }
    structures = [*follows.items(), *own]
    # A set of characters first: the search then skips all others without trying anything.
    first = re.escape(
        "".join(sorted({character for characters, _ in structures for character in characters}))
    )
    cases = "|".join(f"(?<=[{re.escape(characters)}])(?={rest})" for characters, rest in structures)
    return re.compile(f"[{first}](?:{cases})", re.IGNORECASE)


def _loosely(text: str) -> str:
    """A pattern for the text with any white space where it has some."""
    return r"\s++".join(re.escape(part) for part in re.split(r"\s+", text))


# A line's end, then a role's title, whatever signs or numbers stand before and after it, up to the colon or bracket
# that follows.
_ROLE = (
    rf"[{_LINE_END}](?:(?:[^\w{_LINE_END}]|_)*+(?:\d++[.)\]](?:[^\w{_LINE_END}]|_)*+)?(?:{_ROLES})"
    rf"(?:[^\w{_LINE_END}(（:：]|_)*+)"
)
_ROLE_AT_LINE_START = re.compile(rf"{_ROLE}(?=[:：(（])", re.IGNORECASE)
_ROLE_IN_ITS_LINE = re.compile(rf"{_ROLE}(?=[:：(（{_LINE_END}]|\Z)", re.IGNORECASE)


def neutralize(text: str, delimiters: Iterable[str] = (), *, headings: bool = False) -> str:
    """Marks everything in `text` that could be read as structure.

    Args:
        text: Text under judgement, any string whatever.
        delimiters: Further strings that structure the prompt in use, taken literally (case aside).
        headings: Whether a role that has a line to itself begins a turn in that prompt, too.

    Returns:
        Text that holds none of the structures; `restore` undoes it exactly.
    """
    text = text.replace(MARK, MARK + MARK)
    text = _UNTYPEABLE.sub(_number, text)
    text = _structure(tuple(delimiters)).sub(_marked, text)
    return (_ROLE_IN_ITS_LINE if headings else _ROLE_AT_LINE_START).sub(_marked, f"\n{text}")[1:]


def without_tags(text: str) -> str:
    """Marks what opens or closes something, and leaves all else: for what a model wrote and is to go on from."""
    return _structure(()).sub(_marked, text)


def _number(found: re.Match[str]) -> str:
    return _numbered(found.group())


@lru_cache(maxsize=1024)
def _numbered(character: str) -> str:
    return f"{MARK}{{{ord(character):x}}}"


def _marked(found: re.Match[str]) -> str:
    return found.group() + MARK


def restore(text: str) -> str:
    """The text that `neutralize` was given."""

    def original(found: re.Match[str]) -> str:
        if found.group(1):
            return chr(int(found.group(1), 16))
        return MARK if len(found.group()) == 2 else ""

    return _MARKED.sub(original, text)
