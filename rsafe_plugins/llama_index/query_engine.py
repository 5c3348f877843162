"""A query engine behind the guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard import Content, Guard, GuardSettings
from rsafe_plugins.guard.texts import Part
from rsafe_plugins.guard.violation import REFUSAL, OnViolation
from rsafe_plugins.llama_index.judging import (
    EngineExitBehavior,
    Judge,
    Violation,
    aonly,
    asked_of_nodes,
    only,
    part,
)


class RSafeQueryEngine(BaseQueryEngine):
    """A query engine whose question, nodes and answer are judged.

    An unsafe question doesn't reach the engine. The nodes that were used and the answer are judged as one engine
    batch; where one is unsafe, the refusal takes the answer's place, and unsafe nodes are left out of its sources.
    By then the model has seen them: an `RSafeNodePostprocessor` in the engine keeps them from it.

    A streamed answer is held until all of it is judged, or, with `stream_window`, until all that it said so far is.

    Args:
        query_engine: Any query engine.
        guard: A `Guard`, or the settings to make one; None for `Guard()`.
        check_query: Judge the question.
        check_nodes: Judge the nodes that were used.
        check_response: Judge the answer.
        exit_behavior: `replace` (the default) answers with the refusal; `error` raises `RSafeViolationError`.
        violation_message: The refusal's text. Its response has a mapping `rsafe` in its metadata that tells why.
        on_violation: Called with what was judged and the verdict, for each violation.
        stream_window: Characters of a streamed answer after which all that was said so far is judged and handed
            on. Each window costs a check; what a later one blocks, the reader has partly seen. None holds it all.
        callback_manager: LlamaIndex's callback manager.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """

    def __init__(
        self,
        query_engine: BaseQueryEngine,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        *,
        check_query: bool = True,
        check_nodes: bool = True,
        check_response: bool = True,
        exit_behavior: EngineExitBehavior = "replace",
        violation_message: str = REFUSAL,
        on_violation: OnViolation | None = None,
        stream_window: int | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if not hasattr(query_engine, "aquery"):
            raise SettingsError(
                f"RSafeQueryEngine takes a query engine, not {type(query_engine).__name__}: give what its "
                "as_query_engine() makes."
            )
        super().__init__(callback_manager)
        self.query_engine = query_engine
        self.check_query, self.check_nodes, self.check_response = check_query, check_nodes, check_response
        self._judge = Judge(
            guard,
            exit_behavior=exit_behavior,
            violation_message=violation_message,
            on_violation=on_violation,
            stream_window=stream_window,
        )
        self._judge.need(
            check_query="prompt" if check_query else None,
            check_nodes="document" if check_nodes else None,
            check_response="response" if check_response else None,
        )

    @property
    def guard(self) -> Guard:
        """The guard that judges."""
        return self._judge.guard

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"query_engine": self.query_engine}

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The engine's nodes for a query that pass, if the nodes are judged; none where the query is blocked."""
        if self._judge.check(self._asked_of_query(query_bundle)):
            return []
        nodes = self.query_engine.retrieve(query_bundle)
        asked = self._asked_of_nodes(nodes, query_bundle)
        return self._kept(nodes, self._judge.check(asked))

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Like `retrieve`, without blocking the event loop."""
        if await self._judge.acheck(self._asked_of_query(query_bundle)):
            return []
        # Few engines can; without it the nodes come from a thread.
        aretrieve = getattr(self.query_engine, "aretrieve", None)
        nodes: list[NodeWithScore] = await (
            aretrieve(query_bundle)
            if aretrieve
            else asyncio.to_thread(self.query_engine.retrieve, query_bundle)
        )
        asked = self._asked_of_nodes(nodes, query_bundle)
        return self._kept(nodes, await self._judge.acheck(asked))

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """The engine's answer from these nodes, judged as `query` does."""
        if violation := self._judge.check(self._asked_of_query(query_bundle)):
            return self._refusal(violation, self._expected(StreamingResponse))
        response = self.query_engine.synthesize(query_bundle, nodes, additional_source_nodes)
        return self._judged(query_bundle, response)

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Like `synthesize`, without blocking the event loop."""
        if violation := await self._judge.acheck(self._asked_of_query(query_bundle)):
            return self._refusal(violation, self._expected(AsyncStreamingResponse))
        response = await self.query_engine.asynthesize(query_bundle, nodes, additional_source_nodes)
        return await self._ajudged(query_bundle, response)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        if violation := self._judge.check(self._asked_of_query(query_bundle)):
            return self._refusal(violation, self._expected(StreamingResponse))
        return self._judged(query_bundle, self.query_engine.query(query_bundle))

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        if violation := await self._judge.acheck(self._asked_of_query(query_bundle)):
            return self._refusal(violation, self._expected(AsyncStreamingResponse))
        return await self._ajudged(query_bundle, await self.query_engine.aquery(query_bundle))

    def _asked_of_query(self, query: QueryBundle) -> list[Part]:
        # What is embedded may differ from the question, and finds nodes, but is shown to no model.
        return [part(Content.prompt(query.query_str))] if self.check_query else []

    def _asked_of_nodes(self, nodes: Sequence[NodeWithScore], query: QueryBundle) -> list[Part]:
        return asked_of_nodes(nodes, query.query_str) if self.check_nodes else []

    def _asked_of(self, query: QueryBundle, response: RESPONSE_TYPE) -> list[Part]:
        asked = self._asked_of_nodes(response.source_nodes, query)
        if self.check_response and not isinstance(response, StreamingResponse | AsyncStreamingResponse):
            asked.append(part(Content.response(str(response), query.query_str)))
        return asked

    def _judged(self, query: QueryBundle, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        if violation := self._judge.check(self._asked_of(query, response)):
            return self._refusal(violation, response)
        return self._streamed(query, response)

    async def _ajudged(self, query: QueryBundle, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        if violation := await self._judge.acheck(self._asked_of(query, response)):
            return self._refusal(violation, response)
        return self._streamed(query, response)

    def _streamed(self, query: QueryBundle, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        """The response; if it is a stream, one that is judged on its way."""
        if self.check_response and isinstance(response, StreamingResponse):
            return self._gated(query, response)
        if self.check_response and isinstance(response, AsyncStreamingResponse):
            return self._agated(query, response)
        return response

    def _gated(self, query: QueryBundle, response: StreamingResponse) -> StreamingResponse:
        gate = self._judge.gate(_answer_to(query))
        judged = StreamingResponse(None, response.source_nodes, response.metadata)  # type: ignore[arg-type]

        def chunks() -> Iterator[str]:
            for chunk in gate.passed(_said(response)):
                _tell(judged, gate.violation)
                yield chunk

        judged.response_gen = chunks()  # type: ignore[assignment]
        return judged

    def _agated(self, query: QueryBundle, response: AsyncStreamingResponse) -> AsyncStreamingResponse:
        gate = self._judge.gate(_answer_to(query))

        async def chunks() -> AsyncIterator[str]:
            async for chunk in gate.apassed(response.async_response_gen()):
                _tell(judged, gate.violation)
                yield chunk

        judged = AsyncStreamingResponse(chunks(), response.source_nodes, response.metadata)  # type: ignore[arg-type]
        return judged

    def _kept(self, nodes: Sequence[NodeWithScore], violation: Violation | None) -> list[NodeWithScore]:
        """The nodes without those that were blocked; their verdicts come before the answer's."""
        if violation is None or not self.check_nodes:
            return list(nodes)
        blocked = violation.blocked[: len(nodes)]
        return [node for node, is_blocked in zip(nodes, blocked, strict=True) if not is_blocked]

    def _expected(
        self, streaming: type[StreamingResponse] | type[AsyncStreamingResponse]
    ) -> RESPONSE_TYPE | None:
        """An empty response of the form that the engine would give; None where it isn't known, or no stream."""
        synthesizer = getattr(self.query_engine, "_response_synthesizer", None)
        return streaming(None) if getattr(synthesizer, "_streaming", False) else None  # type: ignore[arg-type]

    def _refusal(self, violation: Violation, response: RESPONSE_TYPE | None = None) -> RESPONSE_TYPE:
        """The refusal in the form of the response whose place it takes."""
        text = self._judge.violation_message
        nodes = self._kept(response.source_nodes, violation) if response is not None else []
        # What an engine says of its answer may quote it.
        metadata = violation.mark
        if isinstance(response, StreamingResponse):
            return StreamingResponse(only(text), nodes, metadata)  # type: ignore[arg-type]
        if isinstance(response, AsyncStreamingResponse):
            return AsyncStreamingResponse(aonly(text), nodes, metadata)  # type: ignore[arg-type]
        return _Refusal(text, nodes, metadata)


def _tell(response: StreamingResponse | AsyncStreamingResponse, violation: Violation | None) -> None:
    """What was blocked, before the refusal is read."""
    if violation is not None:
        # What an engine says of its answer may quote it.
        response.metadata = violation.mark


class _Refusal(Response):
    """A refusal that can be read as a stream, too, where it isn't known what was expected."""

    @property
    def response_gen(self) -> Iterator[str]:
        """The refusal."""
        return only(str(self.response))

    def async_response_gen(self) -> AsyncIterator[str]:
        """The refusal."""
        return aonly(str(self.response))

    def print_response_stream(self) -> None:
        """Prints the refusal."""
        print(self.response)


def _said(response: StreamingResponse) -> Iterator[str]:
    """A stream's chunks, also where somebody has read them already."""
    return iter(response.response_gen) if response.response_txt is None else only(response.response_txt)


def _answer_to(query: QueryBundle) -> Callable[[str], Part]:
    return lambda text: part(Content.response(text, query.query_str))
