"""The RSafe reasoning guard for NeMo Guardrails, LangChain and LlamaIndex."""

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
