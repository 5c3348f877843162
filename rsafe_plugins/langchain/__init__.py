"""The guard in LangChain: `RSafeGuard`, a Runnable that hands on only what is safe."""

from rsafe_plugins.langchain.errors import RSafeViolationError
from rsafe_plugins.langchain.guard import RSafeGuard

__all__ = ["RSafeGuard", "RSafeViolationError"]
