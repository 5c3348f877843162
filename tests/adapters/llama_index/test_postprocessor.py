"""RSafeNodePostprocessor in real query and chat engines; only the models are scripted."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index_instrumentation import get_dispatcher
from support.llama_index import events_of

from rsafe_plugins import BackendError, Content, Guard, PolicyError, RSafeError, SettingsError
from rsafe_plugins.guard import GuardSettings
from rsafe_plugins.llama_index import RSafeNodePostprocessor
from rsafe_plugins.testing import ScriptedBackend


class FixedRetriever(BaseRetriever):
    """Brings the same nodes, the same objects even, for every query."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


def node(text: str, score: float | None = None, **fields: Any) -> NodeWithScore:
    return NodeWithScore(node=TextNode(text=text, **fields), score=score)


def query_engine(nodes: list[NodeWithScore], postprocessor: RSafeNodePostprocessor, **kwargs: Any) -> Any:
    """An engine whose model answers with what it was shown."""
    return RetrieverQueryEngine(
        FixedRetriever(nodes),
        response_synthesizer=get_response_synthesizer(llm=MockLLM(), **kwargs),
        node_postprocessors=[postprocessor],
    )


@pytest.fixture
def postprocessor(engine: ScriptedBackend) -> RSafeNodePostprocessor:
    return RSafeNodePostprocessor({"backend": engine})


@pytest.fixture
def nodes(attack: str) -> list[NodeWithScore]:
    return [
        node("We open at 9.", 0.9),
        node(f"Now {attack}.", 0.8),
        node("We close at 5.", 0.7, metadata={"author": "Ann"}),
        node("We are in town.", None),
    ]


async def test_blocked_nodes_are_dropped_and_the_rest_keep_order_and_scores(
    nodes: list[NodeWithScore], postprocessor: RSafeNodePostprocessor
) -> None:
    before = copy.deepcopy(nodes)
    for kept in (postprocessor.postprocess_nodes(nodes), await postprocessor.apostprocess_nodes(nodes)):
        assert kept == [before[0], before[2], before[3]]
    assert nodes == before


async def test_fifty_nodes_are_one_engine_call(
    engine: ScriptedBackend, postprocessor: RSafeNodePostprocessor
) -> None:
    nodes = [node(f"Fact {number}.") for number in range(50)]
    assert postprocessor.postprocess_nodes(nodes) == await postprocessor.apostprocess_nodes(nodes) == nodes
    assert [len(call) for call in engine.calls] == [50, 50]


async def test_no_nodes_ask_nothing(engine: ScriptedBackend, postprocessor: RSafeNodePostprocessor) -> None:
    assert postprocessor.postprocess_nodes([]) == await postprocessor.apostprocess_nodes([]) == []
    assert engine.calls == []


def test_attack_hidden_in_metadata_is_dropped(postprocessor: RSafeNodePostprocessor, attack: str) -> None:
    assert (
        postprocessor.postprocess_nodes([node("We open at 9.", metadata={"author": {"note": attack}})]) == []
    )


def test_attack_in_a_nodes_own_template_is_dropped(
    postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    nodes = [node("We open at 9.", metadata={"a": 1}, text_template=f"{attack} {{metadata_str}} {{content}}")]
    assert postprocessor.postprocess_nodes(nodes) == []


def test_metadata_that_the_model_does_not_see_is_not_judged(
    postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    nodes = [node("We open at 9.", metadata={"path": attack}, excluded_llm_metadata_keys=["path"])]
    assert postprocessor.postprocess_nodes(nodes) == nodes


@pytest.mark.parametrize(
    "media",
    [
        ImageNode(text="We open at 9.", image_url="https://example.org/a.png"),
        ImageNode(text="We open at 9.", image="iVBORw0KGgo="),
        Node(text_resource=MediaResource(text="We open at 9."), image_resource=MediaResource(data=b"aGk=")),
        Node(text_resource=MediaResource(text="We open at 9."), audio_resource=MediaResource(path="a.wav")),
        Node(text_resource=MediaResource(text="We open at 9."), video_resource=MediaResource(path="a.mp4")),
    ],
    ids=lambda media: media.class_name(),
)
async def test_node_that_is_more_than_text_is_a_failed_check(
    media: BaseNode, engine: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [node("We close at 5."), NodeWithScore(node=media)]
    postprocessor = RSafeNodePostprocessor({"backend": engine})
    assert (
        postprocessor.postprocess_nodes(nodes) == await postprocessor.apostprocess_nodes(nodes) == nodes[:1]
    )
    assert f"can't judge a content of type {media.class_name()}" in caplog.text
    allowing = RSafeNodePostprocessor({"backend": engine, "on_error": "allow"})
    assert allowing.postprocess_nodes(nodes) == nodes
    with pytest.raises(RSafeError):
        RSafeNodePostprocessor({"backend": engine, "on_error": "raise"}).postprocess_nodes(nodes)


def test_image_node_without_its_image_is_judged_by_its_text(
    postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    kept = NodeWithScore(node=ImageNode(text="We open at 9."))
    nodes = [kept, NodeWithScore(node=ImageNode(text=attack))]
    assert postprocessor.postprocess_nodes(nodes) == [kept]


def test_document_is_judged_beside_its_query(
    engine: ScriptedBackend, postprocessor: RSafeNodePostprocessor
) -> None:
    postprocessor.postprocess_nodes([node("We open at 9.")], query_str="When do you open?")
    assert "User: When do you open?\nDocument: We open at 9." in engine.requests[0].messages[0].content


async def test_query_engine_shows_its_model_only_what_is_safe(
    nodes: list[NodeWithScore], postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    engine = query_engine(nodes, postprocessor)
    for response in (engine.query("When?"), await engine.aquery("When?")):
        assert "We open at 9." in str(response)
        assert attack not in str(response)
        assert [source.score for source in response.source_nodes] == [0.9, 0.7, None]


def test_streaming_query_engine_shows_its_model_only_what_is_safe(
    nodes: list[NodeWithScore], postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    response = query_engine(nodes, postprocessor, streaming=True).query("When?")
    text = "".join(response.response_gen)
    assert "We open at 9." in text
    assert attack not in text


async def test_chat_engine_shows_its_model_only_what_is_safe(
    nodes: list[NodeWithScore], postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    chat = ContextChatEngine.from_defaults(
        FixedRetriever(nodes), llm=MockLLM(), node_postprocessors=[postprocessor]
    )
    for response in (chat.chat("When?"), await chat.achat("When?")):
        assert "We open at 9." in str(response)
        assert attack not in str(response)


async def test_concurrent_queries_are_one_engine_call_each(
    nodes: list[NodeWithScore], engine: ScriptedBackend, postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    queries = query_engine(nodes, postprocessor)
    responses = await asyncio.gather(*(queries.aquery(f"When {number}?") for number in range(20)))
    assert all(attack not in str(response) for response in responses)
    assert [len(call) for call in engine.calls] == [4] * 20


async def test_sync_and_async_work_each_have_a_span(
    nodes: list[NodeWithScore], postprocessor: RSafeNodePostprocessor
) -> None:
    spans = SimpleSpanHandler()
    root = get_dispatcher()
    root.add_span_handler(spans)
    try:
        postprocessor.postprocess_nodes(nodes)
        await postprocessor.apostprocess_nodes(nodes)
    finally:
        root.span_handlers.remove(spans)
    names = {span.id_.partition("-")[0] for span in spans.completed_spans}
    assert names == {
        "RSafeNodePostprocessor._postprocess_nodes",
        "RSafeNodePostprocessor._apostprocess_nodes",
    }


# The guard


@pytest.mark.parametrize("form", ["guard", "settings", "mapping"])
def test_guard_may_be_a_guard_or_its_settings(form: str, engine: ScriptedBackend) -> None:
    settings = GuardSettings(backend=engine, policy="prompt-injection")
    given = {"guard": Guard.from_settings(settings), "settings": settings}
    postprocessor = RSafeNodePostprocessor(given.get(form, {"backend": engine, "policy": "prompt-injection"}))
    assert postprocessor.guard.policy.name == "prompt-injection"


def test_wrong_settings_are_named_in_one_sentence() -> None:
    with pytest.raises(SettingsError, match="there is no setting 'polcy'"):
        RSafeNodePostprocessor({"polcy": "mlcommons"})


@pytest.mark.parametrize("form", ["json", "pickle"])
def test_copy_judges_by_the_same_settings(form: str) -> None:
    made = RSafeNodePostprocessor(
        {"backend": "llamacpp:guard.gguf", "policy": "prompt-injection", "band": (0.2, 0.6)}
    )
    if form == "json":
        assert made.to_dict()["class_name"] == "RSafeNodePostprocessor"
        restored = RSafeNodePostprocessor.from_json(made.to_json())
    else:
        restored = pickle.loads(pickle.dumps(made))
    assert restored.guard.settings == made.guard.settings


def test_guard_with_a_backend_object_is_not_copied_as_another_guard(
    postprocessor: RSafeNodePostprocessor,
) -> None:
    for write in (postprocessor.to_json, lambda: pickle.dumps(postprocessor)):
        with pytest.raises(Exception, match="only where its backend is given as a string"):
            write()


# Failures


async def test_failing_engine_drops_every_node_and_says_why(
    failing: dict[str, Any], attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    postprocessor = RSafeNodePostprocessor(failing)
    nodes = [node("We open at 9."), node("We close at 5.")]
    engine = query_engine(nodes, postprocessor)
    for response in (engine.query("When?"), await engine.aquery("When?")):
        assert str(response) == "Empty Response"
    assert postprocessor.postprocess_nodes(nodes) == await postprocessor.apostprocess_nodes(nodes) == []
    records = [record for record in caplog.records if record.name.startswith("rsafe_plugins")]
    assert [record.levelno for record in records] == [logging.WARNING] * 4
    assert all("blocked 2 of 2 nodes; the guard failed" in record.getMessage() for record in records)
    assert attack not in caplog.text


async def test_failing_engine_keeps_nodes_only_where_the_user_said_so(failing: dict[str, Any]) -> None:
    postprocessor = RSafeNodePostprocessor({**failing, "on_error": "allow"})
    nodes = [node("We open at 9."), node("We close at 5.")]
    assert postprocessor.postprocess_nodes(nodes)
    assert await postprocessor.apostprocess_nodes(nodes)


async def test_failing_engine_raises_where_the_user_said_so(failing: dict[str, Any]) -> None:
    engine = query_engine([node("We open at 9.")], RSafeNodePostprocessor({**failing, "on_error": "raise"}))
    with pytest.raises(RSafeError):
        engine.query("When?")
    with pytest.raises(RSafeError):
        await engine.aquery("When?")


def test_one_failed_check_drops_one_node() -> None:
    answers = ["\\boxed{safe}", BackendError("busy"), "\\boxed{safe}"]
    nodes = [node("one"), node("two"), node("three")]
    kept = RSafeNodePostprocessor({"backend": ScriptedBackend(answers)}).postprocess_nodes(nodes)
    assert kept == [nodes[0], nodes[2]]


def test_policy_that_says_nothing_of_documents_is_an_error(engine: ScriptedBackend) -> None:
    policy = {
        "name": "mine",
        "categories": [{"id": "A", "name": "A", "description": "a", "applies_to": ["prompt"]}],
    }
    postprocessor = RSafeNodePostprocessor({"backend": engine, "policy": policy})
    with pytest.raises(PolicyError):
        postprocessor.postprocess_nodes([node("We open at 9.")])


async def test_cancelled_query_ends_as_cancelled_and_frees_the_engine(hanging: Any) -> None:
    engine = query_engine([node("We open at 9.")], RSafeNodePostprocessor({"backend": hanging}))
    task = asyncio.create_task(engine.aquery("When?"))
    assert await asyncio.to_thread(hanging.asked.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(hanging.released.wait, 10)


# What becomes of blocked nodes


async def test_redacted_nodes_keep_their_place_and_id_and_nothing_else(
    engine: ScriptedBackend, attack: str
) -> None:
    bad = node(f"Now {attack}.", 0.8, metadata={"author": attack}, text_template=f"{attack} {{content}}")
    postprocessor = RSafeNodePostprocessor({"backend": engine}, mode="redact", redaction="(gone)")
    good = node("We open at 9.", 0.9)
    for kept in (
        postprocessor.postprocess_nodes([bad, good]),
        await postprocessor.apostprocess_nodes([bad, good]),
    ):
        assert [one.node.get_content("all") for one in kept] == ["(gone)", "We open at 9."]
        assert [one.score for one in kept] == [0.8, 0.9]
        assert kept[0].node.node_id == bad.node.node_id
        assert attack not in kept[0].model_dump_json()
    assert attack in bad.node.get_content()


async def test_annotated_nodes_stay_with_a_verdict_that_no_model_sees(
    engine: ScriptedBackend, attack: str
) -> None:
    given = [node(f"Now {attack}.", 0.8), node("We open at 9.", 0.9, metadata={"author": "Ann"})]
    postprocessor = RSafeNodePostprocessor({"backend": engine}, mode="annotate")
    for kept in (postprocessor.postprocess_nodes(given), await postprocessor.apostprocess_nodes(given)):
        assert [one.node.metadata["rsafe"]["label"] for one in kept] == ["unsafe", "safe"]
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert [one.get_content(mode) for one in kept] == [one.get_content(mode) for one in given]
    assert all("rsafe" not in one.node.metadata for one in given)


async def test_events_tell_what_was_blocked_and_why_and_not_its_text(
    engine: ScriptedBackend, nodes: list[NodeWithScore], attack: str
) -> None:
    for way in ("sync", "async"):
        debug = LlamaDebugHandler(print_trace_on_end=False)
        postprocessor = RSafeNodePostprocessor({"backend": engine}, callback_manager=CallbackManager([debug]))
        with events_of("RSafeNodesJudgedEvent") as events:
            if way == "sync":
                postprocessor.postprocess_nodes(nodes)
            else:
                await postprocessor.apostprocess_nodes(nodes)
        (event,) = events
        assert event.judged == 4  # type: ignore[attr-defined]
        (why,) = event.blocked  # type: ignore[attr-defined]
        assert (why["node_id"], why["label"], why["categories"]) == (nodes[1].node.node_id, "unsafe", ["U2"])
        ((_, end),) = debug.get_event_pairs(CBEventType.RERANKING)
        assert end.payload is not None
        assert end.payload["rsafe_blocked"] == [why]
        assert len(end.payload["nodes"]) == 3
        assert attack not in repr(event) + repr(end)


def test_an_unknown_mode_is_refused(engine: ScriptedBackend) -> None:
    with pytest.raises(SettingsError, match="mode must be drop, redact or annotate, not 'hide'"):
        RSafeNodePostprocessor({"backend": engine}, mode="hide")  # type: ignore[arg-type]


def test_a_copy_has_the_same_mode() -> None:
    postprocessor = RSafeNodePostprocessor({"backend": "embedded"}, mode="redact", redaction="(gone)")
    copied = pickle.loads(pickle.dumps(postprocessor))
    assert (copied.mode, copied.redaction) == ("redact", "(gone)")


async def test_the_same_nodes_have_the_same_verdicts_as_in_the_guard() -> None:
    backend = ScriptedBackend(candidates=lambda request: _probabilities(request.messages[-1].content))
    guard = Guard(backend=backend, reasoning="never")
    texts = [f"text {number}" for number in range(20)]
    verdicts = guard.check_many([Content.document(text) for text in texts])
    assert {verdict.label for verdict in verdicts} == {"safe", "unsafe"}
    safe = [text for text, verdict in zip(texts, verdicts, strict=True) if not verdict.blocked]
    postprocessor = RSafeNodePostprocessor(guard)
    kept = postprocessor.postprocess_nodes([node(text) for text in texts])
    assert [one.text for one in kept] == safe


def _probabilities(prompt: str) -> dict[str, float]:
    number = int(prompt.rpartition("text ")[2].split("\n")[0])
    return {"safe": 1 - number / 20, "unsafe": number / 20}


def test_metadata_that_a_multi_modal_synthesizer_shows_is_judged(
    postprocessor: RSafeNodePostprocessor, attack: str
) -> None:
    hidden = [
        node("ok", metadata={"title": attack}, text_template="{content}"),
        NodeWithScore(node=Node(metadata={"caption": attack})),
    ]
    assert postprocessor.postprocess_nodes(hidden) == []
