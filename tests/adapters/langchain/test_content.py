"""What of LangChain's objects is judged, and what stands in their place."""

from __future__ import annotations

import base64
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

from rsafe_plugins import RSafeError
from rsafe_plugins.langchain import RSafeGuard, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

A = "zqxattack"
IMAGE = "iVBORw0KGgo" * 40
ENCODED = base64.b64encode(f"Well, {A}.".encode()).decode()


def call(name: str = "search", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "args": arguments, "id": "call-1", "type": "tool_call"}


ATTACKS: dict[str, Any] = {
    "str": f"well, {A}",
    "human message": HumanMessage(A),
    "chunk of a response": AIMessageChunk(A),
    "second text block": HumanMessage([{"type": "text", "text": "hi"}, {"type": "text", "text": A}]),
    "bare str among blocks": HumanMessage(["hi", A]),
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
    "function call of another form, without spaces": AIMessage(
        "", additional_kwargs={"function_call": {"name": "run", "arguments": f"rm_-rf_{A}_" * 30}}
    ),
    "long text without spaces under a key of its own": HumanMessage(
        [
            {
                "type": "document",
                "source": {
                    "type": "text",
                    "media_type": "text/plain",
                    "data": "how\nto\nbuild\n" * 30 + A,
                },
            }
        ]
    ),
    "text file in base64": HumanMessage([{"type": "file", "mime_type": "text/plain", "base64": ENCODED}]),
    "text file in base64, older form": HumanMessage(
        [{"type": "file", "source_type": "base64", "mime_type": "text/plain", "data": ENCODED}]
    ),
    "text file of a provider": HumanMessage(
        [{"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": ENCODED}}]
    ),
    "text file of another provider": HumanMessage(
        [{"type": "media", "mime_type": "text/markdown", "data": ENCODED}]
    ),
    "text file as a data URL": HumanMessage(
        [{"type": "file", "file": {"file_data": f"data:text/plain;base64,{ENCODED}"}}]
    ),
    "data URL without an encoding": HumanMessage(
        [{"type": "file", "file": {"file_data": f"data:text/plain,{A[:3]}%61{A[4:]}"}}]
    ),
    "text that begins like a data URL": ToolMessage(
        [{"type": "json", "json": {"note": f"data: {A}, and more"}}], tool_call_id="1"
    ),
    "key of a mapping": ToolMessage([{"type": "json", "json": {A: True}}], tool_call_id="1"),
    "key deep in a mapping": ToolMessage([{"type": "json", "json": [{"type": "a", A: 1}]}], tool_call_id="1"),
    "human message before a tool result": [HumanMessage(A), ToolMessage("ok", tool_call_id="1")],
    "human message before a response": [HumanMessage(A), AIMessage("ok")],
    "human message before an agent's steps": [
        HumanMessage(A),
        AIMessage("", tool_calls=[call()]),
        ToolMessage("ok", tool_call_id="call-1"),
        AIMessage("Done."),
    ],
    "tool call before its result": [
        HumanMessage("hi"),
        AIMessage("", tool_calls=[call(query=A)]),
        ToolMessage("ok", tool_call_id="call-1"),
    ],
    "tool result before a response": [
        HumanMessage("hi"),
        AIMessage("", tool_calls=[call()]),
        ToolMessage(A, tool_call_id="call-1"),
        AIMessage("Done."),
    ],
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


UNREADABLE: dict[str, dict[str, Any]] = {
    "image": {"type": "image", "base64": IMAGE, "mime_type": "image/png"},
    "image_url": {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    "input_audio": {"type": "input_audio", "input_audio": {"data": IMAGE, "format": "wav"}},
    "video": {"type": "video", "file_id": "file-1"},
    "file": {"type": "file", "file": {"file_id": "file-1"}},
    "input_file": {"type": "input_file", "file_data": f"data:application/pdf;base64,{IMAGE}"},
    "media": {"type": "media", "mime_type": "application/pdf", "data": IMAGE},
    "document": {"type": "document", "source": {"type": "url", "url": "https://example.org/a.pdf"}},
    "text-plain": {"type": "text-plain", "url": "https://example.org/a.txt", "mime_type": "text/plain"},
    "container_upload": {"type": "container_upload", "file_id": "file-1"},
    "mystery": {"type": "mystery", "payload": {"words": [b"hi"]}},
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("earlier", [False, True], ids=["last message", "earlier message"])
def test_what_is_no_text_is_a_failed_check(kind: str, earlier: bool, engine: ScriptedBackend) -> None:
    image = HumanMessage([{"type": "text", "text": "What is it?"}, UNREADABLE[kind]])
    messages = [image, AIMessage("Hm."), HumanMessage("Go on.")] if earlier else [image]
    with pytest.raises(RSafeViolationError, match=rf"can't judge a content of type {kind}\.$") as blocked:
        RSafeGuard({"backend": engine}).invoke(messages)
    assert (blocked.value.stage, blocked.value.verdict.label) == ("prompt", None)
    assert RSafeGuard({"backend": engine, "on_error": "allow"}).invoke(messages) is messages
    with pytest.raises(RSafeError) as failed:
        RSafeGuard({"backend": engine, "on_error": "raise"}).invoke(messages)
    assert not isinstance(failed.value, RSafeViolationError)
    assert not any(IMAGE in request.messages[0].content for request in engine.requests)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "file", "mime_type": "text/plain", "base64": "no base64!"},
        {"type": "file", "mime_type": "text/plain", "base64": base64.b64encode(b"\xff\xfe").decode()},
    ],
    ids=["not base64", "not UTF-8"],
)
def test_file_that_only_says_it_is_text_is_a_failed_check(
    block: dict[str, Any], engine: ScriptedBackend
) -> None:
    with pytest.raises(RSafeViolationError, match="can't judge a content of type file"):
        RSafeGuard({"backend": engine}).invoke(HumanMessage([block]))


@pytest.mark.parametrize("on_error", ["block", "allow"])
def test_text_beside_an_image_is_judged_whatever_is_done_about_the_image(
    on_error: str, engine: ScriptedBackend, attack: str
) -> None:
    message = HumanMessage([UNREADABLE["image"], {"type": "text", "text": attack}])
    with pytest.raises(RSafeViolationError) as blocked:
        RSafeGuard({"backend": engine, "on_error": on_error}).invoke(message)
    assert blocked.value.verdict.label == "unsafe"


def test_type_that_is_no_name_is_not_quoted(engine: ScriptedBackend) -> None:
    with pytest.raises(RSafeViolationError, match=r"of type unknown\.$"):
        RSafeGuard({"backend": engine}).invoke(HumanMessage([{"type": f"an image of {A}", "url": "a"}]))


def test_image_in_a_tool_result_is_a_failed_check(engine: ScriptedBackend) -> None:
    block = {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "a"}}]}
    with pytest.raises(RSafeViolationError, match="of type image"):
        RSafeGuard({"backend": engine}).invoke(ToolMessage([block], tool_call_id="1"))


def test_image_is_replaced_and_the_rest_stays(engine: ScriptedBackend) -> None:
    messages = [HumanMessage([UNREADABLE["image"]], id="1"), AIMessage("Hm."), HumanMessage("Go on.")]
    guard = RSafeGuard({"backend": engine}, exit_behavior="replace", violation_message="No.")
    assert guard.invoke(messages) == [HumanMessage("No.", id="1"), *messages[1:]]


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


def test_refusal_stands_in_the_place_of_each_blocked_message(engine: ScriptedBackend, attack: str) -> None:
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


def test_all_since_the_last_human_message_is_one_engine_call_each_in_its_conversation(
    engine: ScriptedBackend,
) -> None:
    messages = [
        HumanMessage("one"),
        AIMessage("two"),
        HumanMessage("three"),
        AIMessage("", tool_calls=[call(q=4)]),
        ToolMessage("five", tool_call_id="call-1", name="search"),
    ]
    assert RSafeGuard({"backend": engine}).batch([messages, "six"]) == [messages, "six"]
    assert [len(requests) for requests in engine.calls] == [4]
    asked = [request.messages[0].content for request in engine.requests]
    said = ["User: one", "Agent: two", "User: three", 'Agent: search({"q": 4})', "Tool result (search): five"]
    for last, prompt in zip((3, 4, 5), asked, strict=False):
        assert "\n".join(said[:last]) + "\n<END CONVERSATION>" in prompt


def test_worst_verdict_is_the_one_reported(attack: str) -> None:
    def scores(request: Any) -> dict[str, float]:
        text = request.messages[0].content.partition("<BEGIN CONVERSATION>")[2]
        unsafe = 0.1 if "Agent:" not in text else 0.95 if "Tool result" not in text else 0.8
        return {"safe": 1 - unsafe, "unsafe": unsafe}

    engine = ScriptedBackend("none", candidates=scores)
    with pytest.raises(RSafeViolationError) as blocked:
        RSafeGuard({"backend": engine, "reasoning": "never", "threshold": 0.5}).invoke(
            [HumanMessage("hi"), AIMessage("two"), ToolMessage("three", tool_call_id="1")]
        )
    assert blocked.value.stage == "response"
    assert blocked.value.verdict.score == pytest.approx(0.95)


def test_only_what_the_policy_is_about_is_judged(engine: ScriptedBackend, attack: str) -> None:
    guard = RSafeGuard({"backend": engine, "policy": "prompt-injection"})
    messages = [HumanMessage(attack), AIMessage("", tool_calls=[call()])]
    with pytest.raises(RSafeViolationError) as blocked:
        guard.invoke([*messages, ToolMessage(attack, tool_call_id="call-1")])
    assert blocked.value.stage == "tool_result"
    assert len(engine.requests) == 1


def test_list_of_str_is_prompts_and_nothing_else(engine: ScriptedBackend, attack: str) -> None:
    for kind in ("document", "response"):
        with pytest.raises(TypeError, match=r"\.map\(\)"):
            RSafeGuard({"backend": engine}, kind=kind).invoke(["open at nine", attack])  # type: ignore[arg-type]
    assert engine.requests == []
    with pytest.raises(RSafeViolationError):
        RSafeGuard({"backend": engine}).invoke(["open at nine", attack])
    with pytest.raises(RSafeViolationError):
        RSafeGuard({"backend": engine}, kind="document").map().invoke(["open at nine", attack])
