r"""Keeps text under judgement from forging the prompt's structure: visibly, and so that it can be undone.

A mark (`¦`) is put inside whatever could end a section, open or close a thought, start a turn or fake a
verdict: `<think>` becomes `<¦think>`, `\boxed{` becomes `\¦boxed{`, `User:` at the start of a line becomes
`User¦:`. Marks that stand in the text already are doubled. Characters that engines can't take (controls, lone
surrogates) are written as their number, `¦{0}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

MARK = "¦"

# What opens or closes something in a prompt of ours, or in the chat templates of the common model families:
# ChatML, Llama 2 to 4, Gemma, Mistral, Harmony, Phi, Qwen, DeepSeek, Granite.
_TAGS = (
    "think|thinking|thought|reasoning|reflection|analysis|answer|"
    "s|bos|eos|unk|pad|mask|sep|cls|"
    "start_of_turn|end_of_turn|start_of_image|start_of_role|end_of_role|"
    "im_start|im_end|im_sep|endoftext|"
    "system|user|assistant|agent|human|developer|tool|function|instructions?|policy|"
    "tools?_calls?|tools?_responses?|tools?_results?|function_calls?|function_results?|guardian"
)
_BRACKETS = (
    "INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|THINK|"
    "PREFIX|SUFFIX|MIDDLE|IMG|BOS|EOS"
)
_ROLES = (
    "user|agent|assistant|system|human|ai|bot|model|developer|tool(?: (?:call|result))?|document|function|"
    "ipython|query|categories|policy|verdict|judge"
)

_UNTYPEABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_MARKED = re.compile(rf"{MARK}{MARK}|{MARK}\{{([0-9a-f]+)\}}|{MARK}")


@lru_cache(maxsize=64)
def _structure(delimiters: tuple[str, ...]) -> re.Pattern[str]:
    """One character that begins a structure, seen with what follows it.

    The quantifiers are possessive, so that no text makes the search slower than linear.
    """
    own = "".join(rf"|{re.escape(d[0])}(?={re.escape(d[1:])})" for d in delimiters if len(d) > 1)
    return re.compile(
        rf"<(?=[|｜]|\s*+/?+\s*+(?:(?:{_TAGS})\b|(?:begin|end)[ _\-])|<\s*+/?+\s*+SYS\b)"
        rf"|[|｜](?=>)"
        rf"|\[(?=\s*+/?+\s*+(?:{_BRACKETS})\s*+\])"
        rf"|\\(?=\s*+f?boxed\b)"
        rf"{own}",
        re.IGNORECASE,
    )


_ROLE_AT_LINE_START = re.compile(
    r"(?:^|(?<=[\n\r\u2028\u2029]))"
    rf"([ \t>#*_~`\-]{{0,16}}(?:{_ROLES})(?: ?\([^()\n]{{0,64}}\))?[ \t*_`]{{0,8}})(?=[:：])",
    re.IGNORECASE,
)


def neutralize(text: str, delimiters: Iterable[str] = ()) -> str:
    """Marks everything in `text` that could be read as structure.

    Args:
        text: Text under judgement, any string whatever.
        delimiters: Further strings that structure the prompt in use, taken literally (case aside).

    Returns:
        Text that holds none of the structures; `restore` undoes it exactly.
    """
    text = text.replace(MARK, MARK + MARK)
    text = _UNTYPEABLE.sub(lambda found: f"{MARK}{{{ord(found.group()):x}}}", text)
    text = _structure(tuple(delimiters)).sub(lambda found: found.group() + MARK, text)
    return _ROLE_AT_LINE_START.sub(lambda found: found.group() + MARK, text)


def restore(text: str) -> str:
    """The text that `neutralize` was given."""

    def original(found: re.Match[str]) -> str:
        if found.group(1):
            return chr(int(found.group(1), 16))
        return MARK if len(found.group()) == 2 else ""

    return _MARKED.sub(original, text)
