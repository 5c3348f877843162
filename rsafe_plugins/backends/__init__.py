"""The shared inference backend: one contract, one module an engine."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsafe_plugins.backends.base import Backend, Completion, Message, Request, Usage
from rsafe_plugins.errors import SettingsError

if TYPE_CHECKING:
    from rsafe_plugins.backends.llamacpp import LlamaCppBackend
    from rsafe_plugins.backends.openai import OpenAIBackend
    from rsafe_plugins.backends.transformers import TransformersBackend
    from rsafe_plugins.backends.vllm import VLLMBackend

__all__ = [
    "Backend",
    "Completion",
    "LlamaCppBackend",
    "Message",
    "OpenAIBackend",
    "Request",
    "TransformersBackend",
    "Usage",
    "VLLMBackend",
    "backend_from_string",
    "shared_backend",
]


# An engine's module is imported when it is first asked for.
_MODULES = {
    "LlamaCppBackend": "llamacpp",
    "OpenAIBackend": "openai",
    "TransformersBackend": "transformers",
    "VLLMBackend": "vllm",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_shared: dict[str, Backend] = {}
_lock = threading.Lock()


def shared_backend(text: str) -> Backend:
    """The one backend of this process for a backend string: guards that name the same engine share it.

    Raises:
        SettingsError: The string names no backend.
    """
    with _lock:
        if text not in _shared or _shared[text].closed:
            _shared[text] = backend_from_string(text)
        return _shared[text]


def backend_from_string(text: str) -> Backend:
    """The backend that a backend string names.

    Args:
        text: `embedded` (llama.cpp in process with the packaged guard), `embedded:ADAPTER` (the same weights with a
            GGUF LoRA adapter of your own), `llamacpp:PATH` (any GGUF), `llamacpp:PATH#ADAPTER` (with a GGUF LoRA
            adapter made for it), `transformers:MODEL` (a Hugging Face name or folder, or a GGUF file), `vllm:MODEL` (a
            Hugging Face name or folder), or `openai:BASE_URL#MODEL` (a server that speaks OpenAI's chat API; several
            addresses with commas between them are one pool; without `#MODEL` the only model that it has).

    Raises:
        SettingsError: The string names no backend.
    """
    engine, _, rest = text.partition(":")
    if text == "embedded" or (engine in ("embedded", "llamacpp") and rest):
        from rsafe_plugins.backends.llamacpp import LlamaCppBackend

        if engine == "llamacpp":
            model, adapter = model_and_adapter(rest)
            return LlamaCppBackend(model, adapter=adapter)
        return LlamaCppBackend(adapter=rest) if rest else LlamaCppBackend()
    if engine == "transformers" and rest:
        from rsafe_plugins.backends.transformers import TransformersBackend

        return TransformersBackend(rest)
    if engine == "vllm" and rest:
        from rsafe_plugins.backends.vllm import VLLMBackend

        return VLLMBackend(rest)
    if engine == "openai":
        from rsafe_plugins.backends.openai import OpenAIBackend

        urls, _, model = rest.partition("#")
        return OpenAIBackend(urls.split(","), model or None)
    raise SettingsError(
        "backend must be 'embedded', 'embedded:ADAPTER', 'llamacpp:PATH', 'llamacpp:PATH#ADAPTER', "
        f"'transformers:MODEL', 'vllm:MODEL' or 'openai:BASE_URL#MODEL', not {text!r}."
    )


def with_files(text: str, find: Callable[[str], str]) -> tuple[str, list[str]]:
    """A backend string with other paths, and the files among them that there must be.

    Args:
        text: As `backend_from_string` takes it.
        find: The path of what it names.
    """
    engine, _, rest = text.partition(":")
    if engine == "transformers" and rest:
        return f"{engine}:{find(rest)}", []  # a file, a folder, or a name
    if engine not in ("embedded", "llamacpp") or not rest:
        return text, []
    named = [rest] if engine == "embedded" else [part for part in model_and_adapter(rest) if part]
    files = [find(part) for part in named]
    return f"{engine}:{'#'.join(files)}", files


def model_and_adapter(text: str) -> tuple[str, str | None]:
    """The two paths of `PATH#ADAPTER`. Such a mark in a file's own name is known by the file."""
    marks = [place for place, letter in enumerate(text) if letter == "#" and 0 < place < len(text) - 1]
    if not marks or Path(text).expanduser().exists():
        return text, None
    place = next((place for place in marks if Path(text[:place]).expanduser().exists()), marks[-1])
    return text[:place], text[place + 1 :]
