"""The RSafe reasoning guard for NeMo Guardrails, LangChain and LlamaIndex."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsafe_plugins.errors import (
        BackendError,
        BackendTimeout,
        BackendUnavailable,
        PolicyError,
        RSafeError,
        SettingsError,
        VerdictError,
    )
    from rsafe_plugins.guard import Content, Guard, Verdict
    from rsafe_plugins.policy import Category, Policy

__all__ = [
    "BackendError",
    "BackendTimeout",
    "BackendUnavailable",
    "Category",
    "Content",
    "Guard",
    "Policy",
    "PolicyError",
    "RSafeError",
    "SettingsError",
    "Verdict",
    "VerdictError",
]

_HOME = {
    "Category": "rsafe_plugins.policy",
    "Content": "rsafe_plugins.guard",
    "Guard": "rsafe_plugins.guard",
    "Policy": "rsafe_plugins.policy",
    "Verdict": "rsafe_plugins.guard",
}


def __getattr__(name: str) -> Any:
    # A name's module is imported when the name is first asked for: `rsafe --help` or an adapter's import then
    # doesn't pay for all of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "rsafe_plugins.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
