"""The shared inference backend: one contract, one module an engine."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from rsafe_plugins.backends.base import Backend, Completion, Message, Request, Usage
from rsafe_plugins.errors import SettingsError

if TYPE_CHECKING:
    from rsafe_plugins.backends.llamacpp import LlamaCppBackend

__all__ = [
    "Backend",
    "Completion",
    "LlamaCppBackend",
    "Message",
    "Request",
    "Usage",
    "backend_from_string",
    "shared_backend",
]


def __getattr__(name: str) -> Any:
    # An engine's module is imported when it is first asked for.
    if name == "LlamaCppBackend":
        from rsafe_plugins.backends.llamacpp import LlamaCppBackend

        return LlamaCppBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def shared_backend(text: str) -> Backend:
    """The one backend of this process for a backend string: guards that name the same engine share it."""
    return backend_from_string(text)


def backend_from_string(text: str) -> Backend:
    """The backend that a backend string names.

    Args:
        text: `embedded` (llama.cpp in process with the packaged guard), or `llamacpp:PATH` (any GGUF).

    Raises:
        SettingsError: The string names no backend.
    """
    from rsafe_plugins.backends.llamacpp import LlamaCppBackend

    engine, _, rest = text.partition(":")
    if text == "embedded":
        return LlamaCppBackend()
    if engine == "llamacpp" and rest:
        return LlamaCppBackend(rest)
    raise SettingsError(f"backend must be 'embedded' or 'llamacpp:PATH', not {text!r}.")
