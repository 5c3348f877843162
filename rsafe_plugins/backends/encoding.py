"""Requests in the tokens of a Hugging Face tokenizer, for the engines that come with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rsafe_plugins.backends.base import Request
from rsafe_plugins.backends.chat_template import rendered
from rsafe_plugins.backends.tokens import Tokens, check_text, common_length
from rsafe_plugins.errors import BackendError, InputTooLong


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request in tokens.

    Attributes:
        request: The request.
        tokens: What comes before the first token that is asked for.
        tails: The tokens of each candidate after `tokens`; empty where text is asked for.
    """

    request: Request
    tokens: Tokens
    tails: Mapping[str, Tokens]

    @property
    def paths(self) -> list[Tokens]:
        """The rows to compute: what each candidate's last token follows, but for those that another contains."""
        paths = sorted({tail[:-1] for tail in self.tails.values()} or {()})
        return [
            path
            for path, following in zip(paths, [*paths[1:], None], strict=True)
            if following is None or following[: len(path)] != path
        ]

    @property
    def new(self) -> int:
        """Tokens that may come after `tokens`."""
        return max(map(len, self.tails.values()), default=self.request.max_tokens)

    @property
    def length(self) -> int:
        """Tokens that it may come to, the answer included."""
        return len(self.tokens) + self.new


def encode(tokenizer: Any, request: Request, context: int) -> Encoded:
    """A request in tokens.

    Args:
        tokenizer: A tokenizer of transformers, with a chat template.
        request: The request.
        context: Tokens that prompt and answer may have together.

    Raises:
        InputTooLong: It doesn't fit the context.
        BackendError: The template refuses the chat, or the text isn't Unicode.
    """
    prompt = rendered(
        lambda chat, args: str(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **args)
        ),
        request.messages,
        request.template_args,
    )
    prompt += request.prefill
    texts = [prompt, *(prompt + candidate for candidate in request.candidates)]
    for text in texts:
        check_text(text, context)
    # The template writes the beginning-of-text token itself, where its model wants one.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens, *whole = (tuple(row) for row in ids)
    # Where a tokenizer merges the prefill's end with a candidate's beginning, scoring starts before that.
    start = min((common_length(tokens, full) for full in whole), default=len(tokens))
    tails = {name: full[start:] for name, full in zip(request.candidates, whole, strict=True)}
    if not start:
        raise BackendError("The prompt must be at least one token long, and it is empty.")
    if not all(tails.values()):
        raise BackendError("A candidate must be at least one token long, and one is empty.")
    encoded = Encoded(request, tokens[:start], MappingProxyType(tails))
    if encoded.length > context:
        raise InputTooLong(
            f"The prompt has {len(tokens)} tokens, and with {encoded.length - len(tokens)} more for the answer "
            f"that is over the {context} of the model's context: shorten it, check it in parts, or use a "
            "model with a larger one."
        )
    return encoded
