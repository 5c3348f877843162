"""RSafeGuard in real chains; only the models are scripted."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import (
    AddableDict,
    ConfigurableField,
    RunnableGenerator,
    RunnableLambda,
    RunnablePassthrough,
)

from rsafe_plugins import BackendError, Guard, SettingsError
from rsafe_plugins.guard import GuardSettings
from rsafe_plugins.langchain import RSafeGuard, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

SAFE, UNSAFE = "\\boxed{safe}", "\\boxed{unsafe}"


@pytest.fixture
def guard(engine: ScriptedBackend) -> RSafeGuard:
    return RSafeGuard({"backend": engine})


class Recorder(BaseCallbackHandler):
    """What a tracer gets to see of a guard's outcome."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.ended: list[Any] = []
        self.failed: list[BaseException] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.started.append(kwargs.get("name"))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.ended.append(outputs)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self.failed.append(error)


# How a guard is made


@pytest.mark.parametrize("form", ["guard", "settings", "mapping"])
def test_guard_may_be_a_guard_or_its_settings(form: str, engine: ScriptedBackend) -> None:
    settings = GuardSettings(backend=engine, policy="mlcommons")
    given = {"guard": Guard.from_settings(settings), "settings": settings}
    guard = RSafeGuard(given.get(form, {"backend": engine, "policy": "mlcommons"}))
    assert guard.guard.policy.name == "mlcommons"
    assert guard.invoke("hi") == "hi"


def test_wrong_settings_are_named_in_one_sentence(engine: ScriptedBackend) -> None:
    with pytest.raises(SettingsError, match="there is no setting 'polcy'"):
        RSafeGuard({"polcy": "mlcommons"})
    with pytest.raises(SettingsError, match="guard must be a Guard or a mapping"):
        RSafeGuard("mlcommons")  # type: ignore[arg-type]


def test_exit_behavior_can_be_configured_at_run_time(guard: RSafeGuard, attack: str) -> None:
    configurable = guard.configurable_fields(exit_behavior=ConfigurableField(id="exit"))
    replaced = configurable.with_config(configurable={"exit": "replace"}).invoke(attack)
    assert replaced == "I can't help with that request."
    with pytest.raises(RSafeViolationError):
        configurable.invoke(attack)


# One input


async def test_safe_input_is_handed_on_unchanged(guard: RSafeGuard) -> None:
    messages = [HumanMessage("How do I bake bread?")]
    assert guard.invoke(messages) is messages
    assert await guard.ainvoke(messages) is messages


async def test_blocked_input_raises_with_categories_and_without_content(
    guard: RSafeGuard, attack: str
) -> None:
    with pytest.raises(RSafeViolationError) as sync:
        guard.invoke(attack)
    with pytest.raises(RSafeViolationError) as native:
        await guard.ainvoke(attack)
    assert str(sync.value) == str(native.value) == "RSafe blocked the prompt: U2."


def test_message_holds_the_probability_where_there_is_one(attack: str) -> None:
    backend = ScriptedBackend("none", candidates={"safe": 0.02, "unsafe": 0.98})
    with pytest.raises(
        RSafeViolationError, match=r"^RSafe blocked the prompt \(probability of unsafe 0\.98\)\.$"
    ):
        RSafeGuard({"backend": backend}).invoke(attack)


def test_violation_survives_pickling(guard: RSafeGuard, attack: str) -> None:
    with pytest.raises(RSafeViolationError) as blocked:
        guard.invoke(attack)
    copy = pickle.loads(pickle.dumps(blocked.value))
    assert (str(copy), copy.stage, copy.verdict) == (str(blocked.value), "prompt", blocked.value.verdict)


@pytest.mark.parametrize("text", ["hi", "zqxattack"])
def test_annotate_hands_everything_on_with_its_verdict(text: str, engine: ScriptedBackend) -> None:
    annotated = RSafeGuard({"backend": engine}, exit_behavior="annotate").invoke(text)
    assert annotated["input"] is text
    assert annotated["verdict"].blocked is (text != "hi")


def test_value_under_the_input_key_is_judged_and_replaced(engine: ScriptedBackend, attack: str) -> None:
    guard = RSafeGuard({"backend": engine}, input_key="question", exit_behavior="replace")
    assert guard.invoke({"question": attack, "k": 4}) == {
        "question": "I can't help with that request.",
        "k": 4,
    }
    safe = {"question": "hi", "note": attack}
    assert guard.invoke(safe) is safe
    with pytest.raises(TypeError, match="expected a mapping with the key 'question'"):
        guard.invoke({"query": attack})
    with pytest.raises(TypeError, match="expected a mapping with the key 'question'"):
        guard.invoke(attack)


# Many inputs


async def test_fifty_inputs_are_one_engine_call_in_order(engine: ScriptedBackend, guard: RSafeGuard) -> None:
    inputs = [f"question {number}" for number in range(50)]
    assert guard.batch(inputs) == inputs
    assert await guard.abatch(inputs) == inputs
    assert list(guard.batch_as_completed(inputs)) == list(enumerate(inputs))
    assert [indexed async for indexed in guard.abatch_as_completed(inputs)] == list(enumerate(inputs))
    assert guard.map().invoke(inputs) == inputs
    assert [len(call) for call in engine.calls] == [50] * 5


async def test_empty_batch_asks_nothing(engine: ScriptedBackend, guard: RSafeGuard) -> None:
    assert guard.batch([]) == await guard.abatch([]) == []
    assert list(guard.batch_as_completed([])) == []
    assert list(guard.stream("hi")) == ["hi"]
    assert [len(call) for call in engine.calls] == [1]


async def test_each_input_of_a_batch_has_its_own_exception(guard: RSafeGuard, attack: str) -> None:
    inputs: list[Any] = ["one", attack, 3, "four"]
    for outputs in (
        guard.batch(inputs, return_exceptions=True),
        await guard.abatch(inputs, return_exceptions=True),
        [output for _, output in guard.batch_as_completed(inputs, return_exceptions=True)],
    ):
        assert [outputs[0], outputs[3]] == ["one", "four"]
        assert isinstance(outputs[1], RSafeViolationError)
        assert isinstance(outputs[2], TypeError)
    with pytest.raises(RSafeViolationError):
        guard.batch(inputs)
    with pytest.raises(RSafeViolationError):
        await guard.abatch(inputs)


def test_retry_asks_again_only_for_what_failed() -> None:
    engine = ScriptedBackend([SAFE, BackendError("busy"), SAFE])
    guard = RSafeGuard({"backend": engine}).with_retry(wait_exponential_jitter=False)
    assert guard.batch(["one", "two"]) == ["one", "two"]
    assert [len(call) for call in engine.calls] == [2, 1]


def test_fallback_takes_what_was_blocked(engine: ScriptedBackend, guard: RSafeGuard, attack: str) -> None:
    answers = guard.with_fallbacks(
        [RunnableLambda(lambda _: "refused")], exceptions_to_handle=(RSafeViolationError,)
    )
    assert answers.batch(["one", attack, "three"]) == ["one", "refused", "three"]
    assert [len(call) for call in engine.calls] == [3]


async def test_two_hundred_concurrent_calls_each_get_their_own_outcome(
    guard: RSafeGuard, attack: str
) -> None:
    inputs = [f"{attack} {number}" if number % 7 == 0 else f"question {number}" for number in range(200)]
    outputs = await asyncio.gather(*(guard.ainvoke(text) for text in inputs), return_exceptions=True)
    for text, output in zip(inputs, outputs, strict=True):
        assert isinstance(output, RSafeViolationError) if attack in text else output == text


# In a chain


async def test_chain_is_guarded_at_both_ends(engine: ScriptedBackend, guard: RSafeGuard, attack: str) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
    model = FakeListChatModel(responses=["Flour and water.", f"Well, {attack}."])
    chain = prompt | guard | model | guard | StrOutputParser()
    assert chain.invoke({"question": "bread?"}) == "Flour and water."
    with pytest.raises(RSafeViolationError) as response:
        await chain.ainvoke({"question": "bread?"})
    assert response.value.stage == "response"
    with pytest.raises(RSafeViolationError) as blocked:
        chain.invoke({"question": attack})
    assert blocked.value.stage == "prompt"
    assert model.i == 0, "the model answered a blocked prompt"


def test_chain_batches_at_both_ends(engine: ScriptedBackend, attack: str) -> None:
    settings = {"backend": engine}
    chain = (
        RSafeGuard(settings) | FakeListLLM(responses=["fine", "good"]) | RSafeGuard(settings, kind="response")
    )
    outputs = chain.batch(["one", attack, "three"], return_exceptions=True)
    assert {outputs[0], outputs[2]} == {"fine", "good"}
    assert isinstance(outputs[1], RSafeViolationError)
    assert [len(call) for call in engine.calls] == [3, 2]


def test_callbacks_see_the_guard_and_nothing_of_what_it_blocked(engine: ScriptedBackend, attack: str) -> None:
    recorder = Recorder()
    config = {"callbacks": [recorder]}
    guard = RSafeGuard({"backend": engine})
    guard.batch(["hi", attack], config, return_exceptions=True)
    RSafeGuard({"backend": engine}, exit_behavior="replace").invoke(attack, config)
    with pytest.raises(RSafeViolationError):
        list(guard.transform(iter(["zqx", "attack"]), config))
    assert recorder.started == ["RSafeGuard"] * 4
    assert recorder.ended == ["hi", "I can't help with that request."]
    assert len(recorder.failed) == 2
    assert attack not in repr([recorder.ended, recorder.failed, *map(str, recorder.failed)])


# Streams


def source(*chunks: Any) -> RunnableGenerator[Any, Any]:
    def sync(_: Iterator[Any]) -> Iterator[Any]:
        yield from chunks

    async def native(_: AsyncIterator[Any]) -> AsyncIterator[Any]:
        for chunk in chunks:
            yield chunk

    return RunnableGenerator(sync, native)


ATTACK_STREAMS: dict[str, tuple[Any, ...]] = {
    "an attack split over chunks": ("well, zqx", "attack", "."),
    "message chunks": (AIMessageChunk("zqx"), AIMessageChunk("attack"), AIMessageChunk(".")),
    "whole messages": (AIMessage("zqxattack"), AIMessage("fine")),
    "messages and text": (AIMessage("zqxattack"), "fine"),
    "a chunk and a message": (AIMessageChunk("well, zqx"), AIMessage("attack")),
    "a chunk and text": (AIMessageChunk("well, zqx"), "attack"),
    "a chunk with blocks and a message": (
        AIMessageChunk([{"type": "text", "text": "zqx"}]),
        AIMessage("attack"),
    ),
    "a tool call in pieces": (
        AIMessageChunk("", tool_call_chunks=[{"name": "run", "args": '{"a": "zqx', "id": "1", "index": 0}]),
        AIMessageChunk("", tool_call_chunks=[{"name": None, "args": 'attack"}', "id": None, "index": 0}]),
    ),
}


@pytest.mark.parametrize(
    "chunks",
    [
        ([AIMessage("zqx")], [AIMessage("attack")]),
        (AIMessage("zqx"), HumanMessage("attack")),
        (Document("zqx"), Document("attack")),
        ("zqx", {"answer": "attack"}),
        ({"answer": "zqx"}, {"answer": "attack"}),
        (AIMessageChunk([{"type": "image", "url": "https://example.org"}]), AIMessage("hi")),
        ("zqx", None),
    ],
    ids=repr,
)
async def test_stream_of_pieces_that_make_no_text_is_an_error(
    chunks: tuple[Any, ...], guard: RSafeGuard, engine: ScriptedBackend
) -> None:
    passed: list[Any] = []
    with pytest.raises(TypeError, match="can't join what it got"):
        passed.extend((source(*chunks) | guard).stream("go"))
    with pytest.raises(TypeError, match="can't join what it got"):
        await gather_into(passed, (source(*chunks) | guard).astream("go"))
    assert (passed, engine.calls) == ([], [])


async def gather_into(passed: list[Any], stream: AsyncIterator[Any]) -> list[Any]:
    async for chunk in stream:
        passed.append(chunk)
    return passed


@pytest.mark.parametrize("chunks", ATTACK_STREAMS.values(), ids=ATTACK_STREAMS.keys())
async def test_stream_lets_nothing_through_before_all_is_judged(
    chunks: tuple[Any, ...], guard: RSafeGuard
) -> None:
    chain = source(*chunks) | guard
    passed: list[Any] = []
    with pytest.raises(RSafeViolationError):
        passed.extend(chain.stream("go"))
    with pytest.raises(RSafeViolationError):
        await gather_into(passed, chain.astream("go"))
    assert passed == []


@pytest.mark.parametrize(
    "chunks",
    [
        ({"answer": "zqx"}, {"answer": "attack"}),
        (AddableDict(question="hi"), AddableDict(answer="zqx"), AddableDict(answer="attack")),
        (AddableDict(answer=AIMessage("zqxattack")), AddableDict(answer=AIMessage("fine"))),
        ({"answer": "zqx", "n": 1}, {"answer": "attack", "n": 2}),
        ({"answer": AIMessageChunk("zqx"), "n": None}, {"answer": AIMessage("attack"), "n": []}),
    ],
)
def test_stream_of_mappings_is_judged_under_the_input_key(
    chunks: tuple[Any, ...], engine: ScriptedBackend
) -> None:
    with pytest.raises(RSafeViolationError):
        list((source(*chunks) | RSafeGuard({"backend": engine}, input_key="answer")).stream("go"))


@pytest.mark.parametrize("last", ["cut it zqxattack", "cut it in two"])
def test_stream_of_a_parser_whose_text_grows_is_judged_as_it_is_at_last(
    last: str, engine: ScriptedBackend
) -> None:
    words = last.split()
    chunks = [{"answer": " ".join(words[:count])} for count in range(len(words) + 1)]
    chain = source(*chunks) | RSafeGuard({"backend": engine}, kind="response", input_key="answer")
    if "attack" in last:
        with pytest.raises(RSafeViolationError):
            list(chain.stream("go"))
    else:
        assert list(chain.stream("go")) == chunks
    assert f"Agent: {last}\n" in engine.requests[0].messages[0].content


async def test_safe_stream_is_released_in_its_own_chunks_after_one_call(
    engine: ScriptedBackend, guard: RSafeGuard
) -> None:
    for chunks in (("Flour ", "and ", "water."), (AIMessageChunk("Flour "), AIMessageChunk("and water."))):
        chain = source(*chunks) | guard
        for released in (list(chain.stream("go")), await gather_into([], chain.astream("go"))):
            assert all(ours is theirs for ours, theirs in zip(released, chunks, strict=True))
    assert [len(call) for call in engine.calls] == [1] * 4


async def test_blocked_stream_becomes_one_refusal(engine: ScriptedBackend) -> None:
    chain = source(*ATTACK_STREAMS["message chunks"]) | RSafeGuard(
        {"backend": engine}, exit_behavior="replace"
    )
    refused = AIMessageChunk("I can't help with that request.")
    assert list(chain.stream("go")) == await gather_into([], chain.astream("go")) == [refused]


def test_blocked_stream_of_mappings_becomes_one_mapping_with_the_refusal(engine: ScriptedBackend) -> None:
    chunks = ({"source": "a book"}, {"answer": "zqx", "n": 1}, {"answer": "attack", "n": 2})
    guard = RSafeGuard(
        {"backend": engine}, input_key="answer", exit_behavior="replace", violation_message="No."
    )
    assert list((source(*chunks) | guard).stream("go")) == [{"source": "a book", "answer": "No.", "n": 2}]


def test_annotated_stream_is_one_verdict_over_the_whole(engine: ScriptedBackend) -> None:
    chain = source("zqx", "attack") | RSafeGuard({"backend": engine}, exit_behavior="annotate")
    (annotated,) = chain.stream("go")
    assert (annotated["input"], annotated["verdict"].blocked) == ("zqxattack", True)


async def test_empty_stream_stays_empty(engine: ScriptedBackend, guard: RSafeGuard) -> None:
    assert list(guard.transform(iter([]))) == []
    assert engine.calls == []


def test_answer_beside_its_question_streams_through_a_guard(engine: ScriptedBackend, attack: str) -> None:
    prompt = ChatPromptTemplate.from_template("{question}")
    model = prompt | FakeListChatModel(responses=["Flour and water.", attack]) | StrOutputParser()
    chain = RunnablePassthrough.assign(answer=model) | RSafeGuard({"backend": engine}, input_key="answer")
    assert (
        "".join(chunk.get("answer", "") for chunk in chain.stream({"question": "bread?"}))
        == "Flour and water."
    )
    with pytest.raises(RSafeViolationError):
        list(chain.stream({"question": "bread?"}))
