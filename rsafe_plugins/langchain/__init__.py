"""The guard in LangChain: a Runnable, agent middleware, and a filter for documents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rsafe_plugins.guard.violation import RSafeViolationError
from rsafe_plugins.langchain.documents import RSafeDocumentCompressor
from rsafe_plugins.langchain.guard import RSafeGuard

if TYPE_CHECKING:
    from rsafe_plugins.langchain.middleware import RSafeMiddleware

__all__ = ["RSafeDocumentCompressor", "RSafeGuard", "RSafeMiddleware", "RSafeViolationError"]


def __getattr__(name: str) -> Any:
    # Agents live in the package langchain; all else needs only langchain-core.
    if name == "RSafeMiddleware":
        return importlib.import_module(f"{__name__}.middleware").RSafeMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
