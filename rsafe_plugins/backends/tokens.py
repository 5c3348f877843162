"""What the engines that are given text or tokens have in common."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping

from rsafe_plugins.errors import BackendError, InputTooLong

Tokens = tuple[int, ...]
NextTokens = Callable[[Tokens, set[int]], Awaitable[tuple[Mapping[int, float], float]]]

_LONGEST_TOKEN = 256  # bytes; no vocabulary we know has a longer one


def check_text(text: str, context: int | None = None) -> None:
    """Refuses what no tokenizer should be asked for.

    Args:
        text: A prompt.
        context: Tokens of the engine's context; None where they aren't known.

    Raises:
        BackendError: It isn't Unicode text.
        InputTooLong: It can't fit the context, however few tokens it makes.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BackendError(
            f"The prompt must be Unicode text, and character {error.start} of it is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}): replace such characters before the check."
        ) from None  # the error quotes the text
    if context is not None and size > context * _LONGEST_TOKEN:
        raise InputTooLong(
            f"The prompt has {size} bytes, far more than the {context} tokens of the engine's context can hold: "
            "shorten it, or check it in parts."
        )


def common_length(first: Tokens, second: Tokens) -> int:
    """How many first tokens two sequences have in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


async def walk_candidates(
    tails: Mapping[str, Tokens],
    next_tokens: NextTokens,
    negligible: float = 1e-6,
    may_follow: Callable[[Tokens], bool] = lambda path: True,
) -> dict[str, float]:
    """The log-probability of each candidate, a step a token; of labels, nearly always one or two steps.

    Args:
        tails: Each candidate's tokens after what all share; none is empty, none begins with another.
        next_tokens: Given a path of tokens and the tokens that may follow it: log-probabilities of the following
            token, and an upper bound for those that it doesn't hold.
        negligible: Of a candidate whose first token is less than so many times as likely as another candidate's,
            the later tokens aren't looked at; what it gets is an upper bound.
        may_follow: Whether the tokens after a path are looked at; where not, likewise.
    """
    logprobs: dict[str, float] = {}
    open_paths: dict[Tokens, float] = {(): 0.0}
    while open_paths:
        path, so_far = open_paths.popitem()
        names = [name for name, tail in tails.items() if tail[: len(path)] == path and len(tail) > len(path)]
        steps = {tails[name][len(path)] for name in names}
        following, bound = await next_tokens(path, steps)
        best = max(following.get(step, bound) for step in steps)
        for step in steps:
            logprob = following.get(step, bound)
            longer = [name for name in names if tails[name][len(path)] == step]
            for name in longer:
                logprobs[name] = so_far + logprob
            goes_on = any(len(tails[name]) > len(path) + 1 for name in longer)
            if (
                goes_on
                and step in following
                and logprob - best > math.log(negligible)
                and may_follow((*path, step))
            ):
                open_paths[(*path, step)] = so_far + logprob
    return {name: logprobs[name] for name in tails}
