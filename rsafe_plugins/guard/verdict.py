"""The verdict, and the strict parser that reads it from what the model generated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from rsafe_plugins.backends.base import Usage
from rsafe_plugins.errors import VerdictError
from rsafe_plugins.policy import Category, Policy

Label = Literal["safe", "unsafe"]


class Verdict(BaseModel):
    """What the guard says of one content.

    Attributes:
        label: What the model said; None when there is no verdict because something failed.
        blocked: What to do. Differs from the label only where the guard failed; then it follows `on_error`.
        score: Probability of unsafe, 0 to 1; None where the engine gives no probabilities. Of what is safe all the same
            it may be an upper bound, where the exact one would take the engine another request. Where a category that
            the policy leaves out fits better, it lies under the threshold, by as much as that.
        categories: Ids of the policy's categories that the model named, in the policy's order.
        unknown_categories: What the model named as a category and the policy doesn't have.
        reasoning: The model's thought, where it thought.
        error: One sentence on what failed; None for a verdict.
        policy: Name of the policy.
        model: Name of the guard model.
        usage: Tokens used for this verdict; none where it was kept from an earlier check.
        part: Where in the text the part lies that decided, as start and end in characters; None where the text
            was judged as a whole. A text that is too long for the engine is judged in parts, and the worst counts.
        latency_ms: Milliseconds from the call to the verdict; a batch's items share the batch's time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Label | None
    blocked: bool
    score: float | None = None
    categories: tuple[str, ...] = ()
    unknown_categories: tuple[str, ...] = ()
    reasoning: str | None = None
    error: str | None = None
    policy: str = ""
    model: str = ""
    usage: Usage = Usage()
    part: tuple[int, int] | None = None
    latency_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed answer: the label, the thought if there is one, and the text that may name categories."""

    label: Label
    reasoning: str | None
    conclusion: str


_OPEN_OR_CLOSE = re.compile(r"<\s*+(/?+)\s*+think\s*+>", re.IGNORECASE | re.ASCII)
_LIKE_A_TAG = re.compile(r"<\s*+/?+\s*+think", re.IGNORECASE | re.ASCII)
_BOX = re.compile(r"\\\s*+f?box|f?boxed\s*+\{", re.IGNORECASE | re.ASCII)
_SIGNS = " \t\r\n*_`\"'$#:"
_MARKUP = r"[\s*_`\"'$]*"
_BOXED_LABEL = re.compile(
    rf"\\\s*boxed\s*\{{{_MARKUP}"
    rf"(?:\\(?:text|textbf|textit|texttt|mathrm|mathbf|mathit)\s*\{{{_MARKUP}(safe|unsafe){_MARKUP}\}}|(safe|unsafe))"
    rf"{_MARKUP}\}}",
    re.IGNORECASE | re.ASCII,
)


def parse_answer(text: str, *, thinking: bool | None = None) -> Answer:
    """Reads the model's whole answer: a closed thought, then exactly one box with one of the two labels.

    Args:
        text: What the model generated, begun answer included.
        thinking: True if there must be a thought, False if there must be none, None if either will do.

    Raises:
        VerdictError: The answer is anything else; never a guess.
    """
    reasoning, rest = _split_thought(text)
    if _LIKE_A_TAG.search(f"{reasoning}\0{rest}"):
        raise VerdictError("Expected one thought in <think> tags; the answer has others that are like them.")
    if thinking is True and reasoning is None:
        raise VerdictError("Expected a thought in <think> tags before the verdict; the answer has none.")
    if thinking is False and reasoning:
        raise VerdictError("Expected the bare verdict; the answer holds a thought.")
    boxes = len(_BOX.findall(rest))
    if boxes != 1:
        raise VerdictError(
            f"Expected exactly one \\boxed{{safe}} or \\boxed{{unsafe}}; the answer has {boxes} boxes."
        )
    found = _BOXED_LABEL.search(rest)
    if found is None:
        raise VerdictError("Expected safe or unsafe in the box; it holds something else, or isn't closed.")
    if reasoning is None and rest[: found.start()].strip(_SIGNS):
        raise VerdictError(
            "Expected the bare verdict or a thought in <think> tags; the answer begins with text."
        )
    label: Label = "safe" if (found.group(1) or found.group(2)).lower() == "safe" else "unsafe"
    return Answer(label, reasoning, rest[: found.start()] + rest[found.end() :])


def _split_thought(text: str) -> tuple[str | None, str]:
    """The thought and the text around it; None where there is no thought."""
    tags = list(_OPEN_OR_CLOSE.finditer(text))
    if not tags:
        return None, text
    if [tag.group(1) for tag in tags] != ["", "/"]:
        raise VerdictError(
            "Expected one thought, opened and closed once; the answer's <think> tags don't match."
        )
    opening, closing = tags
    before, thought, after = (
        text[: opening.start()],
        text[opening.end() : closing.start()],
        text[closing.end() :],
    )
    if before.strip():
        raise VerdictError("Expected the answer to begin with its thought; it begins with other text.")
    return thought.strip(), after


_CATEGORIES_LINE = re.compile(
    r"^[ \t*_]*categor(?:y|ies)[ \t*_]*:(.*)$((?:\n[ \t]*[-*+\u2022].*)*)", re.IGNORECASE | re.MULTILINE
)
_AROUND_NAMES = " \t\r.*_`\"'[]()-+\u2022"
_AND = re.compile(r"[/&]|\band\b|\s(?=[A-Z]+\d)", re.IGNORECASE)
_NONE = {"", "none", "n/a", "no", "null", "-"}


def named_categories(
    reasoning: str | None, conclusion: str, policy: Policy
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The categories that the model named: ids of the policy, and names it doesn't have.

    The last line `Categories: ...` counts, the conclusion's before the thought's. Where there is no such line,
    it is the ids that stand in the last paragraph that names any: a thought that goes through the whole policy
    names every category, and its end says which were met.
    """
    for text in (conclusion, reasoning or ""):
        lines = _CATEGORIES_LINE.findall(text)
        if lines:
            line, bullets = lines[-1]
            return _listed(line if line.strip(" \t\r*_") else ",".join(bullets.splitlines()), policy)
    for paragraph in reversed(f"{reasoning or ''}\n{conclusion}".splitlines()):
        mentioned = [category.id for category in policy.categories if _mentions(paragraph, category.id)]
        if mentioned:
            return tuple(mentioned), ()
    return (), ()


def _mentions(text: str, identifier: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(identifier)}(?![\w-])", text) is not None


def _listed(line: str, policy: Policy) -> tuple[tuple[str, ...], tuple[str, ...]]:
    known: set[str] = set()
    unknown: list[str] = []
    whole = line.strip(" \t\r.*_`[]()")
    # A category's own name may hold a comma, so the whole line is tried first.
    names = [whole] if policy.find(whole) else re.split(r"[,;]", whole)
    for name in names:
        for part in [name] if _find(name, policy) else _AND.split(name):
            part = part.strip(_AROUND_NAMES)
            category = _find(part, policy) or policy.find(part.split(" ", 1)[0])
            if category is not None:
                known.add(category.id)
            elif part.lower() not in _NONE and part not in unknown:
                unknown.append(part)
    return tuple(c.id for c in policy.categories if c.id in known), tuple(unknown)


def _find(name: str, policy: Policy) -> Category | None:
    """The category whose id or name this is, or both, as in `U2: Weapons` or `U7 Hate Speech & Discrimination`."""
    name = name.strip(_AROUND_NAMES)
    head, colon, _ = name.partition(":")
    first, _, rest = name.partition(" ")
    both = policy.find(first) if rest and policy.find(first) is policy.find(rest) else None
    return policy.find(name) or (policy.find(head) if colon else both)
