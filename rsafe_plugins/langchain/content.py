"""LangChain's objects as contents, and refusals in the shape of LangChain's objects. Pure functions."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import takewhile
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    BaseMessageChunk,
    ChatMessage,
    FunctionMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue

from rsafe_plugins.guard import Content, Turn
from rsafe_plugins.policy import ContentKind

_ROLES: Mapping[str, ContentKind | None] = {
    "assistant": "response",
    "ai": "response",
    "tool": "tool_result",
    "function": "tool_result",
    "system": None,
    "developer": None,
}
# Keys of content blocks whose values are the block's form and never reach a model as text.
_FORM = frozenset({"type", "id", "index", "mime_type", "media_type"})
# An image, a sound or a file written as text: no language is this long without a space or a full stop.
_ENCODED = re.compile(r"(?:data:[^,]{0,256},)?[A-Za-z0-9+/_=\n-]{256,}")


def to_content(value: Any, kind: ContentKind) -> Content:
    """What of a value is judged, and as what.

    Messages are judged as their type says: the last one together with those of its kind right before it, and
    what was said earlier as the conversation's history.

    Args:
        value: A str, a message, messages, a `PromptValue` or a `Document`.
        kind: What a str is. Everything else says it itself.

    Raises:
        TypeError: It is something else.
        ValueError: There is no message to judge.
    """
    if isinstance(value, str):
        return Content(kind, value)
    if isinstance(value, Document):
        return Content.document(_document_text(value))
    messages = _messages(value)
    kind, judged = _judged(messages)
    text = "\n".join(_text(messages[index]) for index in judged)
    if kind == "tool_result":
        names = dict.fromkeys(messages[index].name or "" for index in judged)
        return Content.tool_result(text, ", ".join(filter(None, names)))
    history = tuple(_turn(message) for message in messages[: judged[0]] if _kind(message) is not None)
    return Content(kind, text, history=history)


def refusal(value: Any, text: str) -> Any:
    """A value of the same shape that holds the refusal in place of everything that was judged.

    In messages each judged one is replaced and keeps only its type, its id and the tool call it answers.
    """
    if isinstance(value, str):
        return text
    if isinstance(value, Document):
        return Document(page_content=text, id=value.id)
    if isinstance(value, StringPromptValue):
        return StringPromptValue(text=text)
    if isinstance(value, BaseMessage):
        return _refusal_message(value, text)
    messages = _messages(value)
    _, judged = _judged(messages)
    for index in judged:
        messages[index] = _refusal_message(messages[index], text)
    return ChatPromptValue(messages=messages) if isinstance(value, PromptValue) else messages


def whole(chunks: Sequence[Any]) -> list[Any]:
    """What the chunks of a stream are together: one value where they are pieces of one, else each for itself.

    Only what really continues is joined. `+` alone would tell nothing: it makes a prompt template of two
    messages, and of two mappings it keeps the last value where values can't be added.
    """
    if len(chunks) > 1:
        if all(isinstance(chunk, str) for chunk in chunks):
            return ["".join(chunks)]
        if all(isinstance(chunk, BaseMessageChunk) and type(chunk) is type(chunks[0]) for chunk in chunks):
            return [reduce(operator.add, chunks)]
        if all(isinstance(chunk, Mapping) for chunk in chunks):
            keys = dict.fromkeys(key for chunk in chunks for key in chunk)
            values = {key: whole([chunk[key] for chunk in chunks if key in chunk]) for key in keys}
            if all(len(value) == 1 for value in values.values()):
                return [{key: value[0] for key, value in values.items()}]
    return list(chunks)


def _messages(value: Any) -> list[BaseMessage]:
    if isinstance(value, BaseMessage):
        return [value]
    if isinstance(value, PromptValue):
        return value.to_messages()
    if isinstance(value, list | tuple):
        try:
            return convert_to_messages(value)
        except (LookupError, NotImplementedError, TypeError, ValueError):
            # LangChain's own message quotes the item.
            types = ", ".join(sorted({type(item).__name__ for item in value}))
            raise TypeError(
                f"RSafeGuard takes a list as messages and can't read it as such (it holds {types}); "
                "to judge each item of a list use RSafeGuard().map()."
            ) from None
    hint = "; say with input_key which value is to be judged" if isinstance(value, Mapping) else ""
    raise TypeError(
        "RSafeGuard judges a str, a message, a list of messages, a PromptValue or a Document, "
        f"not {type(value).__name__}{hint}."
    )


def _kind(message: BaseMessage) -> ContentKind | None:
    """What a message is; None for what the developer wrote (system) and what holds no text (remove)."""
    if isinstance(message, SystemMessage | RemoveMessage):
        return None
    if isinstance(message, AIMessage):
        return "response"
    if isinstance(message, ToolMessage | FunctionMessage):
        return "tool_result"
    if isinstance(message, ChatMessage):
        return _ROLES.get(message.role.lower(), "prompt")
    return "prompt"


def _judged(messages: Sequence[BaseMessage]) -> tuple[ContentKind, list[int]]:
    """The kind of the last message, and where the last messages of that kind stand.

    Were only the last one judged, an attack could stand in the one before it.
    """
    spoken = [(index, kind) for index, message in enumerate(messages) if (kind := _kind(message)) is not None]
    if not spoken:
        raise ValueError("RSafeGuard expected a message to judge; it got none besides system messages.")
    last = spoken[-1][1]
    run = takewhile(lambda item: item[1] == last, reversed(spoken))
    return last, sorted(index for index, _ in run)


def _turn(message: BaseMessage) -> Turn:
    text = _text(message)
    match _kind(message):
        case "prompt":
            return Turn("user", text)
        case "tool_result":
            return Turn("agent", f"Tool result: {text}")
        case _:
            return Turn("agent", text)


def _text(message: BaseMessage) -> str:
    """All text of a message: that of every content block, and of the tool calls that an agent would make."""
    parts = list(_texts(message.content))
    if isinstance(message, AIMessage):
        for call in (*message.tool_calls, *message.invalid_tool_calls):
            arguments = call["args"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False, default=str)
            parts.append(f"{call['name']}({arguments})")
        # Providers leave reasoning, refusals and older forms of tool calls here.
        parts.extend(_texts(message.additional_kwargs, "additional_kwargs"))
    return "\n".join(filter(None, parts))


def _texts(value: Any, key: str = "text") -> Iterator[str]:
    """Every string in a message's content, whatever the form of the block, media aside."""
    if isinstance(value, str):
        if key == "text" or not _ENCODED.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _FORM:
                yield from _texts(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


def _document_text(document: Document) -> str:
    # What a chain shows the model of a document is up to its prompt, so the metadata is judged too.
    lines = [f"{key}: {value}" for key, value in document.metadata.items()]
    return "\n".join([*lines, document.page_content])


def _refusal_message(message: BaseMessage, text: str) -> BaseMessage:
    """A new message, so that no field an application or a provider has added goes with it."""
    kept = {"id", "role", "tool_call_id"}
    if isinstance(message, ToolMessage | FunctionMessage):
        kept.add("name")
    fields = {name: getattr(message, name) for name in kept if name in type(message).model_fields}
    return type(message)(content=text, **fields)
