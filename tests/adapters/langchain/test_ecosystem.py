"""LangChain's own suites for retrievers and tools, run on guarded ones; and what a Runnable has to be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableParallel
from langchain_core.tools import BaseTool
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from support.canary import SAFE, UNSAFE, guard_backend

from rsafe_plugins import Guard
from rsafe_plugins.langchain import RSafeDocumentCompressor, RSafeGuard, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend


class Found(BaseRetriever):
    k: int = 3

    def _get_relevant_documents(
        self, query: str, *, run_manager: Any, k: int | None = None
    ) -> list[Document]:
        return [Document(f"Fact {number} about it.") for number in range(k or self.k)]


class GuardedRetriever(ContextualCompressionRetriever):
    """A retriever behind the guard, as someone would write it who wants `k` to be an argument."""

    def __init__(self, k: int = 3) -> None:
        compressor = RSafeDocumentCompressor({"backend": guard_backend()})
        super().__init__(base_compressor=compressor, base_retriever=Found(k=k))


class TestGuardedRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[GuardedRetriever]:
        return GuardedRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return "tides"


class TestGuardTool(ToolsUnitTests):
    @property
    def tool_constructor(self) -> BaseTool:
        guard = RSafeGuard({"backend": ScriptedBackend(SAFE)}, input_key="text")
        return guard.as_tool(name="check", description="Checks a text.", arg_types={"text": str})

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"text": "How do I bake bread?"}


class Tracer(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.types: set[tuple[str, str]] = set()

    def _persist_run(self, run: Run) -> None:
        """Nothing."""

    def _end_trace(self, run: Run) -> None:
        self.types.add((run.name, run.run_type))
        super()._end_trace(run)


@pytest.mark.parametrize("way", ["invoke", "batch", "stream", "ainvoke", "abatch", "astream"])
async def test_a_trace_says_that_it_was_a_guard(way: str) -> None:
    guard, tracer = RSafeGuard({"backend": ScriptedBackend(SAFE)}), Tracer()
    config: Any = {"callbacks": [tracer], "tags": ["mine"]}
    given: Any = ["hi"] if "batch" in way else "hi"
    if way == "astream":
        assert [chunk async for chunk in guard.astream(given, config)] == ["hi"]
    elif way == "stream":
        assert list(guard.stream(given, config)) == ["hi"]
    elif way.startswith("a"):
        assert await getattr(guard, way)(given, config) == given
    else:
        assert getattr(guard, way)(given, config) == given
    assert tracer.types == {("RSafeGuard", "guard")}


def test_fields_can_be_configured_and_the_guard_stays_what_it_was() -> None:
    guard = RSafeGuard({"backend": ScriptedBackend(UNSAFE)})
    chain = guard.configurable_fields(
        exit_behavior=ConfigurableField(id="exit"), violation_message=ConfigurableField(id="text")
    )
    with pytest.raises(RSafeViolationError):
        chain.invoke("hi")
    config: Any = {"configurable": {"exit": "replace", "text": "No."}}
    assert chain.invoke("hi", config) == "No."
    assert chain.batch(["hi", "ho"], config) == ["No.", "No."]


def test_alternatives_of_guards_can_be_configured() -> None:
    strict, mild = (
        RSafeGuard({"backend": ScriptedBackend(UNSAFE)}),
        RSafeGuard({"backend": ScriptedBackend(SAFE)}),
    )
    chain = strict.configurable_alternatives(ConfigurableField(id="guard"), default_key="strict", mild=mild)
    with pytest.raises(RSafeViolationError):
        chain.invoke("hi")
    assert chain.with_config(configurable={"guard": "mild"}).invoke("hi") == "hi"


def test_schemas_and_graph_name_the_guard() -> None:
    chain = RSafeGuard({"backend": ScriptedBackend(SAFE)}) | FakeListChatModel(responses=["x"])
    assert "RSafeGuard" in [node.name for node in chain.get_graph().nodes.values()]
    assert chain.get_input_jsonschema()["title"] == "RSafeGuardInput"


async def test_fifty_single_calls_at_once_are_at_most_three_engine_calls() -> None:
    backend = ScriptedBackend(SAFE)
    guard = RSafeGuard({"backend": backend})
    texts = [f"hi {number}" for number in range(50)]
    assert await asyncio.gather(*map(guard.ainvoke, texts)) == texts
    assert len(backend.requests) == 50
    assert len(backend.calls) <= 3


def test_branches_and_threads_are_joined() -> None:
    backend = ScriptedBackend(SAFE)
    shared = Guard(backend=backend)
    names = [str(number) for number in range(8)]
    branches = {name: (lambda text, name=name: f"{text} {name}") | RSafeGuard(shared) for name in names}
    assert RunnableParallel(branches).invoke("hi", {"max_concurrency": 8}) == {
        name: f"hi {name}" for name in names
    }
    assert len(backend.requests) == 8
    assert len(backend.calls) < 8


async def test_the_same_inputs_have_the_same_verdicts_as_in_the_guard() -> None:
    backend = ScriptedBackend(candidates=lambda request: _probabilities(str(request.messages[-1].content)))
    guard = Guard(backend=backend, reasoning="never")
    texts = [f"text {number}" for number in range(20)]
    verdicts = guard.check_many(texts)
    assert {verdict.label for verdict in verdicts} == {"safe", "unsafe"}
    annotated = RSafeGuard(guard, exit_behavior="annotate").batch(texts)
    kept = await RSafeDocumentCompressor(guard).acompress_documents(list(map(Document, texts)), "")
    assert [one["verdict"].score for one in annotated] == [verdict.score for verdict in verdicts]
    assert [one.page_content for one in kept] == [
        text for text, verdict in zip(texts, verdicts, strict=True) if not verdict.blocked
    ]


def _probabilities(prompt: str) -> dict[str, float]:
    number = int(prompt.rpartition("text ")[2].split("\n")[0])
    return {"safe": 1 - number / 20, "unsafe": number / 20}
