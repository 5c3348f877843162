"""What every engine that is given text, or tokens, has to look at."""

from __future__ import annotations

from rsafe_plugins.errors import BackendError, InputTooLong

Tokens = tuple[int, ...]

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
