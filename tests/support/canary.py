"""The word that leak tests look for, and an engine that finds it unsafe in what is judged."""

from __future__ import annotations

import re
from typing import Any

from rsafe_plugins.backends import Request
from rsafe_plugins.testing import ScriptedBackend

SAFE, UNSAFE = r"\boxed{safe}", r"\boxed{unsafe}"
CANARY = "canary-7431"


def guard_backend(word: str = CANARY) -> ScriptedBackend:
    """A guard's engine that finds unsafe whatever holds a word in the text under judgement."""

    def reply(request: Request) -> str:
        return UNSAFE if word in judged_text(request) else SAFE

    return ScriptedBackend(reply)


def judged_text(request: Request) -> str:
    """The message that a prompt asks about, without the conversation before it."""
    conversation = request.messages[-1].content.partition("<BEGIN CONVERSATION>\n")[2]
    return re.split(r"^(?:User|Agent|Tool call|Tool result|Document)\b", conversation, flags=re.MULTILINE)[-1]


def holds(word: str, *things: Any) -> bool:
    """Whether a word is anywhere in the things' representations."""
    return any(word in repr(thing) for thing in things)
