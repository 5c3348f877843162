"""Tools for tests that need a guard but no engine."""

from rsafe_plugins.testing.scripted import ScriptedBackend

__all__ = ["ScriptedBackend"]
