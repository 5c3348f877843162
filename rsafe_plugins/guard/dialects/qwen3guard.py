"""Qwen3Guard-Gen: three levels, its own categories. Form: the card of Qwen/Qwen3Guard-Gen-0.6B on Hugging Face."""

from __future__ import annotations

import re
from types import MappingProxyType

from rsafe_plugins.guard.dialects.base import ChatDialect


class Qwen3Guard(ChatDialect):
    """Strict: what it calls controversial counts as unsafe. It judges by its own categories, whatever the policy."""

    name = "qwen3guard"
    models = re.compile(r"qwen3[-_]?guard", re.IGNORECASE)
    labels = MappingProxyType({"Safe": "safe", "Controversial": "unsafe", "Unsafe": "unsafe"})
    begin = "Safety: "
    naming = "Safety: Unsafe\nCategories:"
    form = re.compile(
        r"(?:<think>\s*</think>\s*)?Safety: *(?P<label>Safe|Controversial|Unsafe)"
        r"\s*\nCategories: *(?P<categories>[^\n]*)(?:\nRefusal: *(?:Yes|No))?"
    )
    expects = "a line Safety, a line Categories and for responses a line Refusal"
