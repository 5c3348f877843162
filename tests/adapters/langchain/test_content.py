"""What of LangChain's objects is judged, and what stands in their place."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompt_values import ChatPromptValue, StringPromptValue

from rsafe_plugins.langchain import RSafeGuard, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

A = "zqxattack"
IMAGE = "iVBORw0KGgo" * 40


def call(name: str = "search", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "args": arguments, "id": "call-1", "type": "tool_call"}


ATTACKS: dict[str, Any] = {
    "str": f"well, {A}",
    "human message": HumanMessage(A),
    "chunk of a response": AIMessageChunk(A),
    "second text block": HumanMessage([{"type": "text", "text": "hi"}, {"type": "text", "text": A}]),
    "bare str among blocks": HumanMessage(["hi", A]),
    "text block after an image": HumanMessage(
        [{"type": "image", "base64": IMAGE, "mime_type": "image/png"}, {"type": "text", "text": A}]
    ),
    "text block that looks like a file": HumanMessage([{"type": "text", "text": "x" * 300 + A}]),
    "plain-text file block": HumanMessage([{"type": "text-plain", "text": A, "mime_type": "text/plain"}]),
    "document block of a provider": HumanMessage(
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": A}}]
    ),
    "block of an unknown type": HumanMessage([{"type": "mystery", "payload": {"words": ["hi", A]}}]),
    "reasoning block": AIMessage([{"type": "reasoning", "reasoning": A}, {"type": "text", "text": "hi"}]),
    "messages": [HumanMessage("hi"), AIMessage("hello"), HumanMessage(A)],
    "earlier one of two last human messages": [HumanMessage(A), HumanMessage("go on")],
    "human message before a system message": [HumanMessage(A), SystemMessage("Be brief.")],
    "human message before a removal": [HumanMessage(A), RemoveMessage(id="1")],
    "human message around a system message": [
        HumanMessage(A),
        SystemMessage("Be brief."),
        HumanMessage("hi"),
    ],
    "messages as tuples": [("system", "Be brief."), ("human", A)],
    "messages as dicts": [{"role": "user", "content": A}],
    "messages as str": ["hi", A],
    "chat message of a user": ChatMessage(A, role="user"),
    "chat message of an unknown role": ChatMessage(A, role="narrator"),
    "string prompt value": StringPromptValue(text=A),
    "chat prompt value": ChatPromptValue(messages=[HumanMessage(A)]),
    "response": [HumanMessage("hi"), AIMessage(A)],
    "tool call's arguments": AIMessage("", tool_calls=[call(query={"deep": [A]})]),
    "tool call's name": AIMessage("", tool_calls=[call(A)]),
    "second tool call": AIMessage("Searching.", tool_calls=[call(query="hi"), call(query=A)]),
    "tool call that can't be parsed": AIMessage(
        "",
        invalid_tool_calls=[
            {"name": "search", "args": f"{{{A}", "id": "1", "error": None, "type": "invalid_tool_call"}
        ],
    ),
    "tool call in a provider's form": AIMessage(
        "", additional_kwargs={"function_call": {"name": "search", "arguments": f'{{"query": "{A}"}}'}}
    ),
    "tool result": [
        HumanMessage("hi"),
        AIMessage("", tool_calls=[call()]),
        ToolMessage(A, tool_call_id="call-1"),
    ],
    "first of two tool results": [ToolMessage(A, tool_call_id="1"), ToolMessage("hi", tool_call_id="2")],
    "function result": FunctionMessage(A, name="search"),
    "document": Document(A),
    "document's metadata": Document("Opening hours", metadata={"title": A}),
}


@pytest.mark.parametrize("value", ATTACKS.values(), ids=ATTACKS.keys())
def test_attack_is_blocked_wherever_it_stands(value: Any, engine: ScriptedBackend) -> None:
    with pytest.raises(RSafeViolationError) as blocked:
        RSafeGuard({"backend": engine}).invoke(value)
    assert A not in str(blocked.value)


@pytest.mark.parametrize("value", ATTACKS.values(), ids=ATTACKS.keys())
def test_refusal_in_the_same_shape_holds_nothing_of_the_attack(value: Any, engine: ScriptedBackend) -> None:
    replaced = RSafeGuard({"backend": engine}, exit_behavior="replace", violation_message="No.").invoke(value)
    assert A not in repr(replaced)
    assert "No." in repr(replaced)
    assert isinstance(replaced, type(value))


@pytest.mark.parametrize(
    ("value", "stage"),
    [
        (A, "prompt"),
        ([HumanMessage(A)], "prompt"),
        (AIMessage(A), "response"),
        (ToolMessage(A, tool_call_id="1"), "tool_result"),
        (Document(A), "document"),
    ],
)
def test_violation_says_what_was_judged(value: Any, stage: str, engine: ScriptedBackend) -> None:
    with pytest.raises(RSafeViolationError) as blocked:
        RSafeGuard({"backend": engine}).invoke(value)
    assert blocked.value.stage == stage
    assert blocked.value.verdict.categories == ("U2",)


def test_str_is_what_kind_says(engine: ScriptedBackend) -> None:
    RSafeGuard({"backend": engine}, kind="response").invoke("Bread is baked.")
    assert "Agent: Bread is baked." in engine.requests[0].messages[0].content


def test_earlier_messages_are_the_conversation(engine: ScriptedBackend) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("one"), AIMessage("two"), HumanMessage("three")]
    assert RSafeGuard({"backend": engine}).invoke(messages) is messages
    assert "User: one\nAgent: two\nUser: three" in engine.requests[0].messages[0].content


def test_system_messages_are_not_judged(engine: ScriptedBackend, attack: str) -> None:
    RSafeGuard({"backend": engine}).invoke([SystemMessage(attack), HumanMessage("hi")])
    assert attack not in engine.requests[0].messages[0].content


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": IMAGE, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}},
        {"type": "input_audio", "input_audio": {"data": IMAGE, "format": "wav"}},
    ],
)
def test_media_are_not_written_into_the_prompt(block: dict[str, Any], engine: ScriptedBackend) -> None:
    RSafeGuard({"backend": engine}).invoke(HumanMessage([block, {"type": "text", "text": "What is it?"}]))
    assert IMAGE not in engine.requests[0].messages[0].content
    assert "What is it?" in engine.requests[0].messages[0].content


@pytest.mark.parametrize(
    "value",
    [None, 3, b"zqxattack", {"text": A}, [Document(A)], [{"text": A}], [3], ["human", object()]],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_judged_is_a_type_error_of_one_sentence(value: Any, engine: ScriptedBackend) -> None:
    with pytest.raises(TypeError) as wrong:
        RSafeGuard({"backend": engine}).invoke(value)
    assert "RSafeGuard" in str(wrong.value)
    assert "\n" not in str(wrong.value)
    assert A not in str(wrong.value)
    assert engine.calls == []


@pytest.mark.parametrize("value", [[], [SystemMessage("Be brief.")], SystemMessage("Be brief.")])
def test_nothing_to_judge_is_an_error(value: Any, engine: ScriptedBackend) -> None:
    with pytest.raises(ValueError, match="expected a message to judge"):
        RSafeGuard({"backend": engine}).invoke(value)


def test_refused_response_keeps_its_id_and_calls_no_tool(engine: ScriptedBackend, attack: str) -> None:
    response = AIMessage(
        attack,
        id="m1",
        name="agent",
        tool_calls=[call(query="hi")],
        additional_kwargs={"reasoning": attack},
        response_metadata={"stop": attack},
    )
    replaced = RSafeGuard({"backend": engine}, exit_behavior="replace").invoke(response)
    assert replaced == AIMessage("I can't help with that request.", id="m1")


def test_refusal_stands_in_the_place_of_each_judged_message(engine: ScriptedBackend, attack: str) -> None:
    messages = [
        HumanMessage("hi", id="1"),
        AIMessage("", id="2", tool_calls=[call(), call()]),
        ToolMessage("fine", id="3", tool_call_id="a", name="search", artifact=attack),
        ToolMessage(attack, id="4", tool_call_id="b", name="search"),
    ]
    replaced = RSafeGuard({"backend": engine}, exit_behavior="replace", violation_message="No.").invoke(
        messages
    )
    assert replaced == [
        *messages[:2],
        ToolMessage("No.", id="3", tool_call_id="a", name="search"),
        ToolMessage("No.", id="4", tool_call_id="b", name="search"),
    ]
    assert messages[3].content == attack
