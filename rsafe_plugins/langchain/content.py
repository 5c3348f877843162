"""LangChain's objects as contents, and refusals in the shape of LangChain's objects. Pure functions."""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import groupby, pairwise
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    BaseMessageChunk,
    ChatMessage,
    FunctionMessage,
    RemoveMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue

from rsafe_plugins.guard import Content
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.texts import Part, Said, Text, contents_of, parts, text_of, turn_of
from rsafe_plugins.policy import ContentKind, Policy

_ROLES: Mapping[str, ContentKind | None] = {
    "assistant": "response",
    "ai": "response",
    "tool": "tool_result",
    "function": "tool_result",
    "system": None,
    "developer": None,
}


# Where providers leave tool calls beside `tool_calls`.
_RAW_CALLS = frozenset({"tool_calls", "function_call"})
_CALL_BLOCKS = frozenset({"tool_use", "tool_call", "function_call"})


def to_parts(value: Any, kind: ContentKind, policy: Policy) -> list[Part]:
    """What of a value is judged, and as what.

    Messages are judged as their type says, all from the last human one on, each with what was said before it.

    Args:
        value: A str, a message, messages, a `PromptValue` or a `Document`.
        kind: What a str is. Everything else says it itself.
        policy: What it is judged by.

    Raises:
        TypeError: It is something else.
        ValueError: There is no message to judge.
    """
    if isinstance(value, str):
        return [Part(kind, Content(kind, value), (0,))]
    if isinstance(value, Document):
        return [Part("document", Content.document(document_text(value)), (0,))]
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if kind != "prompt" and is_list and all(isinstance(item, str) for item in value):
        raise TypeError(
            f"RSafeGuard takes a list of str as the user's messages, and is to judge a {kind.replace('_', ' ')}: to "
            f"judge each item use RSafeGuard(kind={kind!r}).map()."
        )
    messages = _messages(value)
    spoken = [(index, said) for index, message in enumerate(messages) if (said := _kind(message)) is not None]
    if not spoken:
        raise ValueError("RSafeGuard expected a message to judge; it got none besides system messages.")
    conversation = [_said(messages[index], said) for index, said in spoken]
    return [
        replace(part, messages=tuple(spoken[place][0] for place in part.messages))
        for part in parts(conversation, policy)
    ]


def reply_parts(
    history: Sequence[BaseMessage], reply: AIMessage, calls: Sequence[ToolCall]
) -> list[tuple[Part, ToolCall | None]]:
    """What of a model's answer is judged: all that it says as a response, and each tool call.

    Args:
        history: The messages before it.
        reply: The answer.
        calls: Those of its tool calls that are judged by themselves.

    Returns:
        A part for what it says, if it says anything, with None; then a part for each call, with the call.
    """
    turns = _turns(history)
    said = _text(reply, without=calls)
    found: list[tuple[Part, ToolCall | None]] = []
    if said.text.strip():
        found.append((Part("response", Content("response", said.text, history=turns), ()), None))
    if said.unreadable is not None:
        found.append((Part("response", said.unreadable, ()), None))
    for call in calls:
        content = replace(Content.tool_call(call["name"], call["args"]), history=turns)
        found.append((Part("tool_call", content, ()), call))
    return found


def result_parts(history: Sequence[BaseMessage], result: BaseMessage) -> list[Part]:
    """A message that a tool brings, with the messages before it."""
    judged = contents_of(_text(result), "tool_result", result.name or "", _turns(history))
    return [Part("tool_result", content, ()) for content in judged]


def message_parts(messages: Sequence[BaseMessage], number: int) -> list[Part]:
    """One message of the user, with the messages before it."""
    judged = contents_of(_text(messages[number]), "prompt", history=_turns(messages[:number]))
    return [Part("prompt", content, (number,)) for content in judged]


def is_prompt(message: BaseMessage) -> bool:
    """Whether a message is the user's."""
    return _kind(message) == "prompt"


def is_spoken(message: BaseMessage) -> bool:
    """Whether a message is judged at all; those of the developer aren't."""
    return _kind(message) is not None


def text_shown(message: BaseMessage) -> str:
    """All text of a message, for a person."""
    return _text(message).text


def refusal(value: Any, text: str, blocked: Collection[int]) -> Any:
    """A value of the same shape that holds the refusal in place of everything that was blocked.

    In messages each blocked one is replaced and keeps only its type, its id and the tool call it answers.

    Args:
        value: What was judged.
        text: The refusal.
        blocked: Where the blocked messages stand, where there are several.
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
    for index in blocked:
        messages[index] = _refusal_message(messages[index], text)
    return ChatPromptValue(messages=messages) if isinstance(value, PromptValue) else messages


def whole(chunks: Sequence[Any], input_key: str | None = None) -> Any:
    """What the chunks of a stream are together.

    Args:
        chunks: All of them, at least one.
        input_key: Where they are mappings, the key of what is judged.

    Raises:
        TypeError: They are no pieces of one text, so what they say together can't be told.
    """
    if len(chunks) == 1:
        return chunks[0]
    if input_key is None:
        return _joined(chunks)
    if not all(isinstance(chunk, Mapping) for chunk in chunks):
        raise _apart(chunks)
    together: dict[Any, Any] = {}
    for key in dict.fromkeys(key for chunk in chunks for key in chunk):
        values = [chunk[key] for chunk in chunks if key in chunk]
        is_text = all(isinstance(value, str) for value in values)
        if is_text and _grow(values):
            together[key] = values[-1]
        else:
            together[key] = whole(values) if key == input_key or is_text else values[-1]
    return together


def _grow(values: Sequence[str]) -> bool:
    """Whether each text is the one before it with more behind it, as parsers of JSON stream it.

    Pieces of a text hardly ever are. One or two texts don't tell, and count as pieces; empty ones don't count.
    """
    texts = [value for value in values if value]
    return len(texts) > 2 and all(after.startswith(before) for before, after in pairwise(values))


def length(chunk: Any, input_key: str | None = None) -> int:
    """Characters of a stream's chunk, as far as they are text."""
    judged = chunk.get(input_key, "") if input_key is not None and isinstance(chunk, Mapping) else chunk
    if isinstance(judged, BaseMessage):
        return len(_text(judged).text)
    return len(judged) if isinstance(judged, str) else 0


def _joined(chunks: Sequence[Any]) -> Any:
    """Text in one str, messages of one kind in one message, whatever their classes."""
    if all(isinstance(chunk, str) for chunk in chunks):
        return "".join(chunks)
    messages = [chunk for chunk in chunks if isinstance(chunk, BaseMessage)]
    kinds = {_kind(message) for message in messages}
    if len(kinds) != 1 or not all(isinstance(chunk, BaseMessage | str) for chunk in chunks):
        raise _apart(chunks)
    pieces = [piece for _, run in groupby(chunks, type) for piece in _added(list(run))]
    if len(pieces) == 1:
        return pieces[0]
    texts = [Text(piece) if isinstance(piece, str) else _text(piece) for piece in pieces]
    if any(text.unreadable for text in texts):
        raise _apart(chunks)
    return messages[0].model_copy(update={"content": "".join(text.text for text in texts)})


def _added(chunks: Sequence[Any]) -> Sequence[Any]:
    """Chunks of one class as one, so that the pieces of a tool call find together."""
    return [reduce(operator.add, chunks)] if isinstance(chunks[0], BaseMessageChunk) else chunks


def _apart(chunks: Sequence[Any]) -> TypeError:
    types = ", ".join(dict.fromkeys(type(chunk).__name__ for chunk in chunks))
    return TypeError(
        "RSafeGuard takes a stream of str, of messages of one kind, or with input_key of mappings that hold one "
        f"of these; it can't join what it got ({types}), so judge it as a whole with invoke."
    )


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


def _said(message: BaseMessage, kind: ContentKind) -> Said:
    return Said(kind, _text(message), (message.name or "") if kind == "tool_result" else "")


def _turns(messages: Sequence[BaseMessage]) -> tuple[Turn, ...]:
    kinds = ((message, _kind(message)) for message in messages)
    return tuple(turn_of(_said(message, kind)) for message, kind in kinds if kind is not None)


def _text(message: BaseMessage, without: Sequence[ToolCall] = ()) -> Text:
    """All text of a message: of who speaks, of every content block, and of the tool calls that an agent would make.

    Args:
        message: The message.
        without: Tool calls that are left out, wherever a provider has put them.
    """
    if not isinstance(message, AIMessage):
        said = text_of(message.content)
        # Models are shown who speaks; a tool's name is judged as such.
        name = None if _kind(message) == "tool_result" else message.name
        return replace(said, text="\n".join(filter(None, (name, said.text))))
    blocks: Any = message.content
    kwargs = message.additional_kwargs
    if without:
        ids = {call["id"] for call in without}
        if isinstance(blocks, list):
            blocks = [block for block in blocks if not _is_call(block, ids)]
        kwargs = {key: value for key, value in kwargs.items() if key not in _RAW_CALLS}
    content = text_of(list(_run_together(blocks)) if isinstance(blocks, list) else blocks)
    # Providers leave reasoning, refusals and older forms of tool calls here.
    more = text_of(kwargs)
    others = [call for call in message.tool_calls if call not in without]
    calls = [_call(call) for call in (*others, *message.invalid_tool_calls)]
    if isinstance(message, AIMessageChunk):
        calls += _as_streamed(message)
    texts = [content.text, *calls, more.text]
    return Text("\n".join(filter(None, texts)), content.unreadable or more.unreadable)


def _run_together(blocks: Sequence[Any]) -> Iterator[Any]:
    """The same blocks with text that follows text in one, as readers see it: a stream may part a word in two."""
    for is_text, run in groupby(blocks, _is_text):
        if not is_text:
            yield from run
            continue
        pieces = [block if isinstance(block, Mapping) else {"text": block} for block in run]
        yield "".join(piece["text"] for piece in pieces)
        yield from ({key: value for key, value in piece.items() if key != "text"} for piece in pieces)


def _is_text(block: Any) -> bool:
    if isinstance(block, Mapping):
        return block.get("type") == "text" and isinstance(block.get("text"), str)
    return isinstance(block, str)


def _as_streamed(message: AIMessageChunk) -> Iterator[str]:
    """The arguments of tool calls as they were streamed, where parsing them dropped something of it."""
    parsed = ["".join(json.dumps(call["args"], ensure_ascii=False).split()) for call in message.tool_calls]
    for piece in message.tool_call_chunks:
        streamed = piece["args"] or ""
        if "".join(streamed.split()) not in parsed:
            yield streamed


def _is_call(block: Any, ids: Collection[str | None]) -> bool:
    """Whether a content block is one of these tool calls."""
    if not isinstance(block, Mapping) or block.get("type") not in _CALL_BLOCKS:
        return False
    return block.get("call_id", block.get("id")) in ids


def _call(call: Mapping[str, Any]) -> str:
    arguments = call["args"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, default=str)
    return f"{call['name']}({arguments})"


def document_text(document: Document) -> str:
    """A document's text with its metadata."""
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
