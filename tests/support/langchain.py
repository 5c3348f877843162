"""Chat models and leaks, for tests of agents and chains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolCall
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import Field
from support import canary

STREAM_MODES = ("values", "updates", "messages", "custom", "checkpoints", "tasks", "debug")


class Model(BaseChatModel):
    """Answers from a list, one answer a call; the last one again and again."""

    replies: list[AIMessage]
    asked: list[list[BaseMessage]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        return self.bind(tools=[], **kwargs)

    def _next(self, messages: list[BaseMessage]) -> AIMessage:
        self.asked.append(messages)
        reply = self.replies[min(len(self.asked), len(self.replies)) - 1]
        return reply.model_copy(deep=True)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._next(messages))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        reply = self._next(messages)
        words = reply.text.split(" ") if reply.text else []
        for number, word in enumerate(words):
            chunk = ChatGenerationChunk(
                message=AIMessageChunk(word if number == 0 else f" {word}", id=reply.id)
            )
            if run_manager:
                run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk
        if reply.tool_calls or not words:
            yield ChatGenerationChunk(message=AIMessageChunk("", id=reply.id, tool_calls=reply.tool_calls))


def said(text: str, *calls: ToolCall) -> AIMessage:
    return AIMessage(text, tool_calls=list(calls))


def call(name: str, number: int = 1, **args: Any) -> ToolCall:
    return ToolCall(name=name, args=args, id=f"call-{number}")


def counting_tool(result: Callable[[str], Any] = lambda text: f"looked up {text}") -> tuple[Any, list[str]]:
    """A tool, and what it was run with."""
    runs: list[str] = []

    @tool
    def lookup(text: str) -> Any:
        """Looks something up."""
        runs.append(text)
        return result(text)

    return lookup, runs


class Runs(BaseTracer):
    """All runs that LangChain reports, but those of models: what a model itself says is its own run's output."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        """Nothing: runs are kept one by one."""

    def _end_trace(self, run: Run) -> None:
        if run.run_type not in ("llm", "chat_model", "tool"):
            self.found.append(run)
        super()._end_trace(run)


def holds(word: str, *things: Any) -> bool:
    """Whether a word is anywhere in things, in what a checkpointer stores as well."""
    return any(map(functools.partial(_holds, word), things))


def _holds(word: str, thing: Any) -> bool:
    if isinstance(thing, InMemorySaver):
        return canary.holds(word, thing.storage, thing.writes, thing.blobs)
    return canary.holds(word, thing.__dict__ if isinstance(thing, Run) else thing)
