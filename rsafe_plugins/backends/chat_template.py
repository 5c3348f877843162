"""A model's own chat template, rendered as transformers renders it, so that training and use agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
        chat = [{"role": message.role, "content": message.content} for message in messages]
        given = {"tools": None, "documents": None, "messages": chat, "add_generation_prompt": True}
        try:
            prompt = self._template.render({**args, **given})
            if args and prompt == self._template.render(given):
                raise BackendError(unused(args))
            return prompt
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise BackendError(
                f"The model's chat template refuses a chat of the roles {[m.role for m in messages]} "
                f"({type(error).__name__})."
            ) from error


def unused(args: Mapping[str, Any]) -> str:
    """What to say where a chat template makes nothing of what it was given."""
    return f"The model's chat template has no use for {' and '.join(args)}: the model isn't of this dialect."


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
