"""The knowledge base's way around the retrieval rail, closed.

NeMo runs retrieval rails only where a dialog flow makes the answer. Without dialog flows, and in the mode of a single
call, it puts the knowledge base's chunks into the main model's prompt itself, and no rail sees them. So where the
config has our retrieval rail, the knowledge base gives out only chunks that have passed the guard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nemoguardrails import LLMRails

from rsafe_plugins.nemo.guards import policies_in

Passed = Callable[[Sequence[str], str], Awaitable[list[bool]]]


class GuardedKnowledgeBase:
    """A knowledge base that keeps back the chunks that don't pass.

    Args:
        knowledge_base: NeMo's.
        passed: Says of each of the chunks found for a query whether it may be seen.
    """

    def __init__(self, knowledge_base: Any, passed: Passed) -> None:
        self._knowledge_base = knowledge_base
        self._passed = passed

    async def search_relevant_chunks(self, text: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """The chunks for a query that may be seen, in NeMo's order."""
        chunks = await self._knowledge_base.search_relevant_chunks(text, *args, **kwargs)
        passed = await self._passed([str(chunk["body"]) for chunk in chunks], text)
        return [chunk for chunk, may_be_seen in zip(chunks, passed, strict=True) if may_be_seen]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._knowledge_base, name)


def watch_knowledge_base(app: LLMRails, passed: Passed) -> None:
    """Has the app hand a guarded knowledge base to its actions, if its config has our retrieval rail.

    The app builds its knowledge base after this, and hands it to the actions by `register_action_param`; there is no
    other hook that it passes on every way to the main model.
    """
    runtime = app.runtime
    known = runtime.registered_action_params.get("kb")
    if not policies_in(app.config, "retrieval"):
        return
    if known is not None:
        inner = known._knowledge_base if isinstance(known, GuardedKnowledgeBase) else known
        runtime.register_action_param("kb", GuardedKnowledgeBase(inner, passed))
        return
    register = runtime.register_action_param

    def guarding(name: str, value: Any) -> None:
        if name == "kb" and value is not None and not isinstance(value, GuardedKnowledgeBase):
            value = GuardedKnowledgeBase(value, passed)
        register(name, value)

    runtime.register_action_param = guarding
