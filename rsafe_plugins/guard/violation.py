"""What a blocked content raises, in the adapters that raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rsafe_plugins.errors import PolicyError, RSafeError, SettingsError
from rsafe_plugins.guard.guard import Guard
from rsafe_plugins.guard.verdict import Verdict
from rsafe_plugins.policy import ContentKind

REFUSAL = "I can't help with that request."
OnViolation = Callable[[ContentKind, Verdict], None]
"""Called with what was judged and the verdict on it."""


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


def need_categories(guard: Guard, checks: Mapping[str, ContentKind]) -> None:
    """Refuses checks that the guard's policy has no category for.

    Args:
        guard: The guard.
        checks: What each argument that switches a check on has judged, by its name.

    Raises:
        SettingsError: There is such a check; the message names its argument.
    """
    for name, kind in checks.items():
        try:
            guard.policy.for_kind(kind)
        except PolicyError:
            raise SettingsError(
                f"The policy {guard.policy.name!r} has no category that applies to a {kind}: set "
                f"{name}=False, or choose another policy."
            ) from None


def mark_of(stage: ContentKind, verdict: Verdict) -> dict[str, object]:
    """What anybody may know of a violation, for a refusal's metadata: neither content nor reasoning."""
    return {
        "stage": stage,
        "label": verdict.label,
        "categories": list(verdict.categories),
        "score": verdict.score,
        "policy": verdict.policy,
    }
