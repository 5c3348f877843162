"""What a blocked user reads: the refusal that the rail config defines, at the end of a stream as well."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from nemoguardrails import LLMRails, RailsConfig

from rsafe_plugins.nemo.guards import flow_of, has_output_rail, name_of

REFUSE = "refuse to respond"
"""What the bot does in our flows."""

_DEFAULT = "I'm sorry, I can't respond to that."  # NeMo's own
_FAILURES = ("generation_error", "downstream_error")
_FAILED = json.dumps(
    {"error": {"message": "The answer failed.", "type": "generation_error", "param": "", "code": ""}}
)


def refusal_of(config: RailsConfig) -> str:
    """The config's refusal; NeMo's own where the config has none, or only some that NeMo would have to render."""
    own = (text for text in config.bot_messages.get(REFUSE, ()) if not {"{", "$"} & set(text))
    return next(own, _DEFAULT)


def is_refusal(text: object, config: RailsConfig | None) -> bool:
    """Whether a text is one of the config's refusals."""
    return config is not None and text in config.bot_messages.get(REFUSE, ())


def refuse_in_streams(app: LLMRails) -> None:
    """Has the app's streams end with its refusal where our output rail blocks.

    NeMo ends them with an error object, and its own chat shows that to the user. The object stays where the config
    has `enable_rails_exceptions`, which asks for such in whole answers too. Those of other rails, and of rails that
    broke, always stay.

    In Colang 2 NeMo streams what an action gets from the model before any rail has judged it, and nothing else: there
    our output rail lets nothing through but that it failed.
    """
    if not isinstance(app.stream_async, _RefusingStreams):
        app.stream_async = _RefusingStreams(app, app.stream_async)


class _RefusingStreams:
    """An app's `stream_async`, with our refusal in the place of NeMo's error object, and nothing unjudged."""

    def __init__(self, app: LLMRails, stream_async: Callable[..., AsyncIterator[Any]]) -> None:
        self._app = app
        self._stream_async = stream_async

    def __call__(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        stream = self._stream_async(*args, **kwargs)
        config = self._app.config
        if not has_output_rail(config):
            return stream
        if config.colang_version != "1.0":
            return _failures_of(stream)
        if config.enable_rails_exceptions:
            return stream
        return _refusing(stream, refusal_of(config))


async def _failures_of(stream: Any) -> AsyncIterator[Any]:
    """Nothing of the stream but that it failed."""
    async with aclosing(stream):
        async for chunk in stream:
            text = chunk.get("text") if isinstance(chunk, Mapping) else chunk
            if _error(text).get("type") in _FAILURES:
                yield _FAILED


async def _refusing(stream: Any, refusal: str) -> AsyncIterator[Any]:
    is_empty = True
    async with aclosing(stream):
        async for chunk in stream:
            if _is_block(chunk):
                yield refusal if is_empty else f"\n\n{refusal}"
                continue
            is_empty = is_empty and not (chunk.get("text") if isinstance(chunk, Mapping) else chunk)
            yield chunk


def _is_block(chunk: object) -> bool:
    """Whether it is the object that says that our rail has blocked."""
    error = _error(chunk)
    return (
        error.get("type") == "guardrails_violation"
        and error.get("code") == "content_blocked"
        and name_of(str(error.get("param"))) == flow_of("output")
    )


def _error(chunk: object) -> Mapping[str, Any]:
    """What an error object of a stream says; nothing for any other chunk."""
    if not isinstance(chunk, str) or not chunk.startswith('{"error"'):
        return {}
    try:
        error = json.loads(chunk)["error"]
    except ValueError:
        return {}
    return error if isinstance(error, Mapping) else {}
