"""The shared inference backend: one contract, one module an engine."""

from functools import cache

from rsafe_plugins.backends.base import Backend, Completion, Message, Request, Usage
from rsafe_plugins.errors import SettingsError

__all__ = ["Backend", "Completion", "Message", "Request", "Usage", "backend_from_string", "shared_backend"]


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
        BackendUnavailable: The engine's package isn't installed.
    """
    engine, _, rest = text.partition(":")
    if text == "embedded":
        from rsafe_plugins.backends.llamacpp import LlamaCppBackend

        return LlamaCppBackend()
    if engine == "llamacpp" and rest:
        from rsafe_plugins.backends.llamacpp import LlamaCppBackend

        return LlamaCppBackend(rest, adapter=None)
    raise SettingsError(f"backend must be 'embedded' or 'llamacpp:PATH', not {text!r}.")
