"""Llama Guard 3 and 4: MLCommons' hazards. Form: Meta's page "Llama Guard 3", model cards and prompt formats."""

from __future__ import annotations

import re
from types import MappingProxyType

from rsafe_plugins.guard.dialects.base import ChatDialect


class LlamaGuard(ChatDialect):
    """It judges by the categories S1 to S14 of its chat template: `Guard(policy="mlcommons")` names them."""

    name = "llama-guard"
    models = re.compile(r"llama[-_]?guard", re.IGNORECASE)
    # Some chat templates end before the two line breaks that the answer begins with, some after them.
    labels = MappingProxyType(
        {"safe": "safe", "unsafe": "unsafe", "\n\nsafe": "safe", "\n\nunsafe": "unsafe"}
    )
    naming = "unsafe\n"
    form = re.compile(r"(?P<label>safe|unsafe)(?:\n(?P<categories>S\d+(?: *, *S\d+)*))?")
    expects = "safe, or unsafe and a line with its categories"
