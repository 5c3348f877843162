"""RSafe's own form (arXiv 2506.07736): a thought in `<think>` tags, the verdict in a box."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

from rsafe_plugins.backends.base import Message
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.dialects.base import Dialect, Thought
from rsafe_plugins.guard.prompt import GuardPrompt, Thinking
from rsafe_plugins.guard.verdict import Answer, parse_answer
from rsafe_plugins.policy import Policy


class RSafe(Dialect):
    """RSafe, in our wording or in that of a template file."""

    name = "rsafe"
    models = re.compile(r"rsafe", re.IGNORECASE)
    labels = MappingProxyType({"safe": "safe", "unsafe": "unsafe"})
    begin = "\\boxed{"
    thought: Thought | None = Thought("<think>", "</think>", "\n\\boxed{")
    naming: str | None = "\\boxed{unsafe}\nCategories:"
    by_category: str | None = "rsafe-by-category"
    # A closed box right after the thought, or without one. After anything else the whole answer is read: there may be
    # a second box.
    enough = re.compile(r"\A\s*(?:<think>.*?</think>)?[\s*]*\\boxed\{[^{}]*\}", re.DOTALL)

    def __init__(self, template: str | Path | None = None) -> None:
        self.prompt = GuardPrompt(template)

    def messages(self, policy: Policy, content: Content, thinking: Thinking = "open") -> tuple[Message, ...]:
        """One user message."""
        return self.prompt.messages(policy, content, thinking)

    def parse(self, text: str, *, thinking: bool | None = None) -> Answer:
        """A closed thought, then exactly one box."""
        return parse_answer(text, thinking=thinking)
