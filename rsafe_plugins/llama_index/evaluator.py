"""The guard as one of LlamaIndex's evaluators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.evaluation import BaseEvaluator, EvaluationResult
from llama_index.core.prompts.mixin import PromptDictType

from rsafe_plugins.guard import Content, Guard, GuardSettings, Verdict


class RSafeEvaluator(BaseEvaluator):
    r"""Evaluates whether a response is safe.

    It works wherever evaluators do: in a `RetryQueryEngine`, in a `BatchEvalRunner`, by itself.

    Args:
        guard: A `Guard`, or the settings to make one; None for `Guard()`.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.

    Example:
        >>> from rsafe_plugins.testing import ScriptedBackend
        >>> evaluator = RSafeEvaluator({"backend": ScriptedBackend(r"\boxed{safe}")})
        >>> evaluator.evaluate(query="How do I bake bread?", response="Mix flour and water.").passing
        True
    """

    def __init__(self, guard: Guard | GuardSettings | Mapping[str, Any] | None = None) -> None:
        self.guard = Guard.of(guard)

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts_dict: PromptDictType) -> None:
        """Nothing: the prompt is the guard's."""

    def evaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Evaluates a response; also where an event loop is running.

        Args:
            query: What it answers.
            response: The response.
            contexts: Not used; they are handed on.
            kwargs: Not used.

        Returns:
            `passing`: whether the response isn't blocked. `score`: the probability of safe, 0 to 1, where the engine
            gives one. `feedback`: the guard's reasoning, or the categories that it names. Where the guard failed,
            `invalid_result` is true and `invalid_reason` says why; `passing` is then what `on_error` says.

        Raises:
            ValueError: There is no response.
            RSafeError: The check failed and the guard's `on_error` is `raise`.
        """
        content = _content(query, response)
        return _result(self.guard.check(content), query, response, contexts)

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Like `evaluate`, without blocking the event loop."""
        content = _content(query, response)
        return _result(await self.guard.acheck(content), query, response, contexts)


def _content(query: str | None, response: str | None) -> Content:
    if response is None:
        raise ValueError("RSafeEvaluator evaluates a response, and got none.")
    return Content.response(response, query or "")


def _result(
    verdict: Verdict, query: str | None, response: str | None, contexts: Sequence[str] | None
) -> EvaluationResult:
    named = ", ".join(verdict.categories)
    label = f"{verdict.label}: {named}" if named else verdict.label
    return EvaluationResult(
        query=query,
        response=response,
        contexts=contexts,
        passing=not verdict.blocked,
        score=None if verdict.score is None else 1 - verdict.score,
        feedback=verdict.reasoning or label or verdict.error,
        invalid_result=verdict.error is not None,
        invalid_reason=verdict.error,
    )
