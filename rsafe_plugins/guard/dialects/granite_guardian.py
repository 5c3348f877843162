"""Granite Guardian 4.1: yes or no to criteria, with or without a thought.

Form: the card of ibm-granite/granite-guardian-4.1-8b on Hugging Face. The criteria follow the conversation, in a
message with a `<guardian>` block. The instructions in it are ours; for IBM's own, write a dialect file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

from rsafe_plugins.backends.base import Message
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.dialects.base import (
    Dialect,
    Thought,
    alternating,
    conversation,
    description,
    history,
)
from rsafe_plugins.guard.prompt import Thinking, line, turns
from rsafe_plugins.policy import Policy

_SUBJECTS = {
    "prompt": "the last user's text",
    "response": "the last assistant's text",
    "document": "the document",
    "tool_call": "the tool call",
    "tool_result": "the tool's result",
}


class GraniteGuardian(Dialect):
    """It judges by the user's policy, all of it in one question."""

    name = "granite-guardian"
    # Version 3.3 and older ones take their criteria by their chat templates, which say nothing of others.
    models = re.compile(r"granite4[\w.]*[-_]guardian|granite[-_]guardian[-_:]4", re.IGNORECASE)
    delimiters = (
        "<guardian>",
        "</guardian>",
        "<score>",
        "</score>",
        "<no-think>",
        "### Criteria:",
        "### Scoring Schema:",
    )
    labels = MappingProxyType({"no": "safe", "yes": "unsafe", " no": "safe", " yes": "unsafe"})
    mode_in_prompt = True
    begin = "<think>\n</think>\n<score>"
    thought = Thought("<think>", "</think>", "\n<score>")
    form = re.compile(
        r"(?:<think>(?P<thought>(?:(?!</?think>).)*)</think>\s*)?<score>\s*(?P<label>yes|no)\s*</score>",
        re.DOTALL,
    )
    expects = "a score of yes or no in its tags, after a closed thought if there is one"

    def messages(self, policy: Policy, content: Content, thinking: Thinking = "open") -> tuple[Message, ...]:
        """The conversation, then the criteria."""
        policy = policy.for_kind(content.kind)
        if content.kind in ("prompt", "response"):
            chat = conversation(content, self.delimiters)
        else:
            judged = map(line, turns(replace(content, history=()), self.delimiters))
            chat = alternating([*history(content, self.delimiters), Message("user", "\n".join(judged))])
        subject = _SUBJECTS[content.kind]
        mode = "no-think" if thinking == "skip" else "think"
        block = (
            f"<guardian><{mode}>Judge {subject} of the conversation by the criteria below. "
            + (
                "Answer at once, with empty <think> tags and the score in <score> tags."
                if thinking == "skip"
                else "Reason inside <think></think> tags, then give the score in <score></score> tags."
            )
            + f"\n\n### Criteria: {subject[0].upper()}{subject[1:]} asks for, gives or does what one of these "
            f"categories covers.\n{description(policy)}\n\n"
            f"### Scoring Schema: If {subject} meets the criteria, return 'yes'; otherwise, return 'no'."
        )
        return (*chat, Message("user", block))
