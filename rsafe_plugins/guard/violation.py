"""What a blocked content raises, in the adapters that raise."""

from __future__ import annotations

from rsafe_plugins.errors import RSafeError
from rsafe_plugins.guard.verdict import Verdict
from rsafe_plugins.policy import ContentKind

REFUSAL = "I can't help with that request."


class RSafeViolationError(RSafeError):
    """The guard blocked what it judged. The message holds neither the content nor the guard's reasoning.

    Attributes:
        stage: What was judged: `prompt`, `response`, `document`, `tool_call` or `tool_result`.
        verdict: What the guard says of it; its `label` is None where the guard itself failed.
    """

    def __init__(self, stage: ContentKind, verdict: Verdict) -> None:
        self.stage = stage
        self.verdict = verdict
        super().__init__(_sentence(stage, verdict))

    def __reduce__(self) -> tuple[type[RSafeViolationError], tuple[ContentKind, Verdict]]:
        return type(self), (self.stage, self.verdict)


def _sentence(stage: ContentKind, verdict: Verdict) -> str:
    blocked = f"RSafe blocked the {stage.replace('_', ' ')}"
    if verdict.label is None:
        return f"{blocked} because the guard failed: {verdict.error}"
    categories = f": {', '.join(verdict.categories)}" if verdict.categories else ""
    score = f" (probability of unsafe {verdict.score:.2f})" if verdict.score is not None else ""
    return f"{blocked}{categories}{score}."


def mark_of(stage: ContentKind, verdict: Verdict) -> dict[str, object]:
    """What anybody may know of a violation, for a refusal's metadata: neither content nor reasoning."""
    return {
        "stage": stage,
        "label": verdict.label,
        "categories": list(verdict.categories),
        "score": verdict.score,
        "policy": verdict.policy,
    }
