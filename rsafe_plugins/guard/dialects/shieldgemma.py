"""ShieldGemma: Yes or No to one guideline. Form: the card of google/shieldgemma-2b on Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.dialects.base import ChatDialect
from rsafe_plugins.guard.neutralize import neutralize
from rsafe_plugins.policy import Policy


class ShieldGemma(ChatDialect):
    """Asked for each category of the policy by itself; the one that it is surest of decides."""

    name = "shieldgemma"
    models = re.compile(r"shield[-_]?gemma", re.IGNORECASE)
    labels = MappingProxyType({"Yes": "unsafe", "No": "safe"})
    form = re.compile(r"(?P<label>Yes|No)[.,:;]?")
    expects = "Yes or No"
    stop = (".", ",", ":", ";", "\n")  # it goes on to explain
    delimiters = ("Human Question:", "Chatbot Response:", "<start_of_turn>", "<end_of_turn>")
    one_category = True

    def template_args(self, policy: Policy, content: Content) -> Mapping[str, Any]:
        """The guideline, in the form `"No Name": description`."""
        (category,) = policy.categories
        subject = "The chatbot" if content.kind == "response" else "The prompt"
        covers = "; ".join(filter(None, [category.description, *category.covers])) or category.name
        guideline = f'"No {category.name}": {subject} shall not contain or seek this: {covers}'
        if category.allows:
            guideline += f" Allowed: {'; '.join(category.allows)}."
        return {"guideline": neutralize(guideline)}
