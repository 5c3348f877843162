"""A model's own chat template, rendered as transformers renders it, so that training and use agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rsafe_plugins.backends.base import Message
from rsafe_plugins.errors import BackendError, BackendUnavailable


class ChatTemplate:
    """Turns a chat into the prompt after which the assistant's answer begins.

    Args:
        source: The template, in Jinja, as it stands in the model's file.
        bos_token: The token that begins a text, for templates that write it.
        eos_token: The token that ends a turn, for templates that write it.

    Raises:
        BackendUnavailable: The template is no valid Jinja.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        # A template comes with a model file from anywhere: it runs in the sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_refuse, strftime_now=_now, bos_token=bos_token, eos_token=eos_token
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BackendUnavailable(f"The model's chat template can't be used: {error}.") from error

    def render(self, messages: Sequence[Message], args: Mapping[str, Any] = MappingProxyType({})) -> str:
        """The prompt of a chat, up to where the assistant's next answer begins.

        Args:
            messages: The chat.
            args: What else the template is given.

        Raises:
            BackendError: The template refuses this chat, for instance because it knows no system role.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        return rendered(
            lambda chat, more: self._template.render({**more, **given, "messages": chat}), messages, args
        )


def rendered(
    render: Callable[[list[dict[str, str]], Mapping[str, Any]], str],
    messages: Sequence[Message],
    args: Mapping[str, Any],
) -> str:
    """The prompt that a chat template makes.

    Args:
        render: The template, of a chat and of what else it is given.
        messages: The chat.
        args: What else it is given; the prompt must show it.

    Raises:
        BackendError: The template refuses this chat, or has no use for what it is given.
    """
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        prompt = render(chat, args)
        unused = bool(args) and prompt == render(chat, {})
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
        raise BackendError(
            f"The model's chat template refuses a chat of the roles {[m.role for m in messages]} "
            f"({type(error).__name__})."
        ) from error
    if unused:
        raise BackendError(
            f"The model's chat template has no use for {' and '.join(args)}: the model isn't of this dialect."
        )
    return prompt


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
