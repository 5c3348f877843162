"""What of a conversation is judged: the text of its messages, as contents that no message is missing from."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import unquote

from rsafe_plugins.errors import UnreadableContent
from rsafe_plugins.guard.content import Content, Turn
from rsafe_plugins.guard.guard import Guard
from rsafe_plugins.guard.verdict import Verdict
from rsafe_plugins.policy import ContentKind, Policy

# Blocks that a model sees or hears, and those that hold a file or only say where it is.
_MEDIA = re.compile(r"image|audio|video", re.IGNORECASE)
_FILES = frozenset({"file", "input_file", "document", "media", "container_upload", "text-plain"})
_REFERENCES = frozenset({"url", "uri", "file_url", "file_uri", "fileUri", "file_id"})
_MIME = ("mime_type", "media_type", "mimeType")
_PAYLOAD = frozenset({"data", "base64", "file_data"})
_DATA_URL = re.compile(r"(\s*data:([\w.+-]+/[\w.+-]+)?([^,]{0,256}),)(.*)", re.IGNORECASE | re.DOTALL)
# Keys of a block whose values are its form and never reach a model as text, and those that are plain text.
_FORM = frozenset({"type", "id", "index", *_MIME})
_PLAIN = ("text", "reasoning", "reasoning_content", "thinking", "refusal", "title", "context", "caption")

_SAID_OF_MEDIA = ("transcript", "alt", "alt_text", "description")


@dataclass(frozen=True, slots=True)
class Text:
    """What a message's content says.

    Attributes:
        text: All of its text.
        unreadable: Why there is more than that, and it can't be judged; None where there isn't.
    """

    text: str
    unreadable: UnreadableContent | None = None


def text_of(content: Any) -> Text:
    """All text of a message's content.

    Args:
        content: A str, a content block, or a list of both. Of blocks every key and value is text, whatever the
            block's type; files of text are decoded. An image, a sound, a file of anything else, and what is only
            referred to can't be read.
    """
    texts: list[str] = []
    unreadable = None
    try:
        for found in _texts(content):
            if isinstance(found, str):
                texts.append(found)
            else:
                unreadable = unreadable or found
    except RecursionError:
        unreadable = UnreadableContent("nested")
    return Text("\n".join(filter(None, texts)), unreadable)


def _texts(content: Any) -> Iterator[str | UnreadableContent]:
    """Its texts, and what can't be read in its place."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from _block(content)
    elif isinstance(content, list | tuple):
        for item in content:
            yield from _texts(item)
    else:
        yield UnreadableContent(type(content).__name__)


def _block(block: Mapping[Any, Any]) -> Iterator[str | UnreadableContent]:
    first, held = next(iter(block.items()), ("", ""))
    kind = str(block.get("type") or ("" if isinstance(held, int | float) else first))
    named = (str(key) for key, value in block.items() if isinstance(value, Mapping))
    closed = next((name for name in (kind, *named) if _MEDIA.search(name)), None)
    if closed is None and kind in _FILES and _refers(block):
        closed = kind
    if closed is not None:
        yield UnreadableContent(closed)
    readable = {}
    for key, value in block.items():
        if key in _PLAIN and isinstance(value, str):
            yield value
        elif key == "content" and isinstance(value, str | list | tuple):
            yield from _texts(value)
        elif key not in _FORM and value and closed is None:
            try:
                # A key that is no str can be one that JSON doesn't take.
                readable[str(key)] = _readable(value, kind, block, key)
            except UnreadableContent as error:
                yield error
        elif closed is not None:
            yield from _said_of_media({key: value})
    if readable:
        yield json.dumps(readable, ensure_ascii=False, default=str)


def _said_of_media(value: Any) -> Iterator[str]:
    """What is said in or beside it, at any depth."""
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(inner, Mapping | list | tuple):
            yield from _said_of_media(inner)
        elif isinstance(inner, str) and (key in _PLAIN or key in _SAID_OF_MEDIA):
            yield inner


def _refers(block: Mapping[Any, Any]) -> bool:
    """Whether a file, or what stands right in it, is a reference instead of the file's content."""
    inside = (value for value in block.values() if isinstance(value, Mapping))
    return any(
        isinstance(value, str) and value and not _DATA_URL.match(value)
        for part in (block, *inside)
        for key, value in part.items()
        if key in _REFERENCES
    )


def _readable(value: Any, kind: str, declared: Mapping[Any, Any], key: Any = None) -> Any:
    """The same value with text in the place of encoded text.

    Args:
        value: Anything in a block.
        kind: The block's type, for the error.
        declared: The mapping that says what the value is.
        key: Its key there.
    """
    if isinstance(value, Mapping):
        if _MEDIA.search(inner := str(value.get("type", ""))):
            raise UnreadableContent(inner)
        own = value if any(name in value for name in _MIME) else {**declared, **value}
        # A key that is no str can be one that JSON doesn't take.
        return {str(name): _readable(item, kind, own, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item, kind, declared, key) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        raise UnreadableContent(kind)
    if not isinstance(value, str) or key in _FORM or key in _PLAIN:
        return value
    mime = next((str(declared[name]) for name in _MIME if declared.get(name)), "")
    if url := _DATA_URL.match(value):
        head, mime, form, data = url.groups()
        if mime is not None and not mime.lower().startswith("text/"):
            raise UnreadableContent(kind)
        # What stands before the comma is kept: it may be a sentence that only begins like a data URL.
        return head + (_decoded(data, kind) if form.lower().rstrip().endswith("base64") else unquote(data))
    is_plain = "text" in (declared.get("type"), declared.get("source_type"))
    if not mime:
        if kind in _FILES and key in _PAYLOAD and not is_plain:
            raise UnreadableContent(kind)
        return value
    if not mime.lower().startswith("text/"):
        raise UnreadableContent(kind)
    return _decoded(value, kind) if key in _PAYLOAD and not is_plain else value


def _decoded(data: str, kind: str) -> str:
    try:
        return base64.b64decode("".join(unquote(data).split()), validate=True).decode("utf-8")
    except ValueError:
        raise UnreadableContent(kind) from None


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a conversation.

    Attributes:
        kind: What it is.
        said: What it says.
        name: Of a tool's result, the tool.
    """

    kind: ContentKind
    said: Text
    name: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """Messages of one kind in a row.

    Attributes:
        kind: What they are.
        content: Their text, or why what they hold beside it can't be judged.
        messages: Where they stand in the conversation.
    """

    kind: ContentKind
    content: Content | UnreadableContent
    messages: tuple[int, ...]


def contents_of(
    said: Text, kind: ContentKind, name: str = "", history: tuple[Turn, ...] = ()
) -> list[Content | UnreadableContent]:
    """What of one message is judged, however little it says: its text, and why it holds more than that.

    Args:
        said: What it says.
        kind: What it is.
        name: Of a tool's result, the tool.
        history: What was said before it.
    """
    if said.unreadable is None:
        return [Content(kind, said.text, name, history)]
    text = [Content(kind, said.text, name, history)] if said.text.strip() else []
    return [*text, said.unreadable]


def parts(conversation: Sequence[Said], policy: Policy) -> list[Part]:
    """What of a conversation is judged: all from the last prompt on, each with what was said before it.

    Were only the last message judged, an attack could stand in the one before it, followed by a harmless
    "ok" that the client made up. What can't be read is in here wherever it stands, since the model sees it.

    Args:
        conversation: Its messages, oldest first.
        policy: Only kinds that a category of it applies to are judged; but always what stands last.
    """
    runs = [list(run) for _, run in groupby(range(len(conversation)), lambda index: conversation[index].kind)]
    prompts = [number for number, run in enumerate(runs) if conversation[run[0]].kind == "prompt"]
    first = prompts[-1] if prompts else 0
    kinds = {kind for category in policy.categories for kind in category.applies_to}
    found = []
    for number, run in enumerate(runs):
        kind, messages = conversation[run[0]].kind, [conversation[index] for index in run]
        last = number == len(runs) - 1
        if kind not in kinds and not last:
            continue
        unreadable = next((message.said.unreadable for message in messages if message.said.unreadable), None)
        text = "\n".join(message.said.text for message in messages)
        if number >= first and (text.strip() or (last and unreadable is None)):
            names = ", ".join(filter(None, dict.fromkeys(message.name for message in messages)))
            history = tuple(turn_of(message) for message in conversation[: run[0]])
            found.append(Part(kind, Content(kind, text, names, history), tuple(run)))
        if unreadable is not None:
            found.append(Part(kind, unreadable, tuple(run)))
    return found


def turn_of(message: Said) -> Turn:
    """A message as a turn that was taken before."""
    text = message.said.text
    if message.kind == "tool_result":
        text = f"Tool result: {text}"
    return Turn("user" if message.kind == "prompt" else "agent", text)


def check_many(guard: Guard, contents: Sequence[Content | UnreadableContent]) -> list[Verdict]:
    """`guard.check_many`, where a content may be unreadable: that is a failed check, and `on_error` decides.

    Raises:
        RSafeError: A check failed and `on_error` is `raise`.
    """
    return _with_failures(guard, contents, guard.check_many(_judgeable(contents)))


async def acheck_many(guard: Guard, contents: Sequence[Content | UnreadableContent]) -> list[Verdict]:
    """Like `check_many`, without blocking the caller's event loop."""
    return _with_failures(guard, contents, await guard.acheck_many(_judgeable(contents)))


def worst(verdicts: Sequence[Verdict]) -> int:
    """Where the verdict stands that decides: a blocked one before others, then unsafe, then failed ones."""

    def badness(index: int) -> tuple[bool, bool, bool, float]:
        verdict = verdicts[index]
        return verdict.blocked, verdict.label == "unsafe", verdict.error is not None, verdict.score or 0.0

    return max(range(len(verdicts)), key=badness)


def _judgeable(contents: Sequence[Content | UnreadableContent]) -> list[Content]:
    return [content for content in contents if isinstance(content, Content)]


def _with_failures(
    guard: Guard, contents: Sequence[Content | UnreadableContent], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    remaining = iter(verdicts)
    return [
        _failure(guard, content) if isinstance(content, UnreadableContent) else next(remaining)
        for content in contents
    ]


def _failure(guard: Guard, error: UnreadableContent) -> Verdict:
    if guard.settings.on_error == "raise":
        raise error
    return Verdict(
        label=None,
        blocked=guard.settings.on_error == "block",
        error=str(error),
        policy=guard.policy.name,
        model=guard.backend.model,
    )
