"""Scripted models of LlamaIndex, and all that its instrumentation reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms import (
    ChatMessage,
    CompletionResponse,
    CompletionResponseGen,
    CustomLLM,
    LLMMetadata,
)
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import get_dispatcher
from pydantic import Field


class Says(CustomLLM):
    """Says the same each time, word by word where it streams."""

    text: str
    asked: list[str] = Field(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self.asked.append(prompt)
        return CompletionResponse(text=self.text)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        self.asked.append(prompt)
        said = ""
        for number, word in enumerate(self.text.split(" ")):
            delta = word if number == 0 else f" {word}"
            said += delta
            yield CompletionResponse(text=said, delta=delta)


class Found(BaseRetriever):
    """Brings the same nodes for every query."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


def query_engine(llm: Any, *texts: str, streaming: bool = False) -> RetrieverQueryEngine:
    synthesizer = get_response_synthesizer(llm=llm, streaming=streaming)
    return RetrieverQueryEngine(Found(*texts), response_synthesizer=synthesizer)


def scripted_agent_model(*replies: ChatMessage) -> tuple[MockFunctionCallingLLM, list[Sequence[ChatMessage]]]:
    """A model that calls tools, answering from a list; and what it was asked."""
    asked: list[Sequence[ChatMessage]] = []

    def reply(messages: Sequence[ChatMessage], **_: Any) -> ChatMessage:
        asked.append(list(messages))
        return replies[min(len(asked), len(replies)) - 1].model_copy(deep=True)

    return MockFunctionCallingLLM(response_generator=reply), asked


def said(text: str) -> ChatMessage:
    return ChatMessage(text, role="assistant")


def calls(*calls: tuple[str, dict[str, Any]], text: str = "") -> ChatMessage:
    blocks: list[Any] = [
        ToolCallBlock(tool_call_id=f"call-{number}", tool_name=name, tool_kwargs=arguments)
        for number, (name, arguments) in enumerate(calls)
    ]
    message = ChatMessage(text or None, role="assistant")
    message.blocks = [*message.blocks, *blocks]
    return message


class _Handler(BaseEventHandler):
    events: list[BaseEvent] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Handler"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)


@contextmanager
def events_of(*names: str) -> Iterator[list[BaseEvent]]:
    """The events of these classes that LlamaIndex reports meanwhile; without names all of them."""
    handler = _Handler()
    root = get_dispatcher()
    root.add_event_handler(handler)
    found: list[BaseEvent] = []
    try:
        yield found
    finally:
        root.event_handlers.remove(handler)
        found.extend(event for event in handler.events if not names or event.class_name() in names)
