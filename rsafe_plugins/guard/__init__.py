"""Content, the guided-reasoning prompt, the strict parser, the verdict, and the guard that joins them."""

from rsafe_plugins.guard.content import Content, Turn
from rsafe_plugins.guard.guard import Guard
from rsafe_plugins.guard.settings import GuardSettings
from rsafe_plugins.guard.verdict import Verdict

__all__ = ["Content", "Guard", "GuardSettings", "Turn", "Verdict"]
