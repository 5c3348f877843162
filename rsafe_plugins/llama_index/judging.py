"""What the engines' wrappers have in common: what is asked of the guard, and what a violation does."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.schema import NodeWithScore

from rsafe_plugins.errors import SettingsError, UnreadableContent
from rsafe_plugins.guard import Content, Guard, GuardSettings, Verdict
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.streams import Windows, aand_end, and_end, check_window
from rsafe_plugins.guard.texts import Part, Said, Text, acheck_many, check_many, text_of, turn_of, worst
from rsafe_plugins.guard.violation import OnViolation, RSafeViolationError, mark_of, need_categories
from rsafe_plugins.llama_index.nodes import node_content
from rsafe_plugins.policy import ContentKind

logger = logging.getLogger(__name__)

EngineExitBehavior = Literal["replace", "error"]

_CALLS = ("tool_calls", "tool_call_id")
# Opaque bytes by which providers know their own thoughts again.
_SIGNATURES = frozenset({"signature", "thought_signature", "thought_signatures"})
DEVELOPERS = (MessageRole.SYSTEM, MessageRole.DEVELOPER)
"""The roles that speak for the developer, and aren't judged."""
_KINDS: Mapping[MessageRole, ContentKind | None] = {
    **dict.fromkeys(DEVELOPERS),
    MessageRole.USER: "prompt",
    MessageRole.TOOL: "tool_result",
    MessageRole.FUNCTION: "tool_result",
}
MARK = "rsafe"
"""The key in the metadata of a refusal."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What was blocked first of all, by badness.

    Attributes:
        stage: What it is.
        verdict: The guard's verdict on it.
        blocked: Which of those asked were blocked.
    """

    stage: ContentKind
    verdict: Verdict
    blocked: tuple[bool, ...]

    @property
    def mark(self) -> dict[str, Any]:
        """What the refusal's metadata may hold."""
        return {MARK: mark_of(self.stage, self.verdict)}


class Judge:
    """Asks the guard for a wrapper, and raises where its user wants that.

    Args:
        guard: A `Guard`, or the settings to make one.
        exit_behavior: `replace` or `error`.
        violation_message: The refusal's text.
        on_violation: Called for each violation.
        stream_window: Characters of a stream after which all that was said so far is judged; None holds all of it.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """

    def __init__(
        self,
        guard: Guard | GuardSettings | Mapping[str, Any] | None,
        *,
        exit_behavior: EngineExitBehavior,
        violation_message: str,
        on_violation: OnViolation | None,
        stream_window: int | None,
    ) -> None:
        if exit_behavior not in ("replace", "error"):
            raise SettingsError(f"exit_behavior must be replace or error, not {exit_behavior!r}.")
        check_window(stream_window)
        self.guard = Guard.of(guard)
        self.violation_message = violation_message
        self._raises = exit_behavior == "error"
        self._on_violation = on_violation
        self._window = stream_window

    def need(self, **checks: ContentKind | None) -> None:
        """Refuses checks that the policy has no category for, by the names of their arguments; None is one that is off.

        Raises:
            SettingsError: There is one.
        """
        need_categories(self.guard, {name: kind for name, kind in checks.items() if kind is not None})

    def check(self, asked: Sequence[Part]) -> Violation | None:
        """What of it is blocked, judged as one engine batch; None where nothing is.

        Raises:
            RSafeViolationError: Something is, and that should be an error.
            RSafeError: A check failed and the guard's `on_error` is `raise`.
        """
        return self._violation(asked, check_many(self.guard, [part.content for part in asked]))

    async def acheck(self, asked: Sequence[Part]) -> Violation | None:
        """Like `check`, without blocking the event loop."""
        return self._violation(asked, await acheck_many(self.guard, [part.content for part in asked]))

    def _violation(self, asked: Sequence[Part], verdicts: Sequence[Verdict]) -> Violation | None:
        blocked = tuple(verdict.blocked for verdict in verdicts)
        if not any(blocked):
            return None
        decides = worst(verdicts)
        stage, verdict = asked[decides].kind, verdicts[decides]
        if verdict.error is not None:
            # A refusal doesn't say so, and the guard's user has to know.
            logger.warning("RSafe blocked a %s; the guard failed: %s", stage, verdict.error)
        if self._on_violation is not None:
            self._on_violation(stage, verdict)
        if self._raises:
            raise RSafeViolationError(stage, verdict)
        return Violation(stage, verdict, blocked)

    def gate(self, asked: Callable[[str], Part]) -> Gate:
        """A gate for one streamed answer.

        Args:
            asked: What to judge for the text so far.
        """
        return Gate(self, self._window, asked)


class Gate:
    """Hands on the chunks of a streamed answer as far as it is judged; then the refusal if it is blocked.

    Attributes:
        violation: What was blocked; None as long as nothing is.
    """

    def __init__(self, judge: Judge, window: int | None, asked: Callable[[str], Part]) -> None:
        self.violation: Violation | None = None
        self._judge = judge
        self._asked = asked
        self._stream: Windows[str] = Windows(window, len, "".join)

    def passed(self, chunks: Iterator[str]) -> Iterator[str]:
        """The chunks that may be read. No more are drawn once the answer is blocked."""
        for chunk in and_end(chunks):
            if self._stream.add(chunk):
                self.violation = self._judge.check(self._said_so_far())
                yield from self._released()
                if self.violation:
                    return

    async def apassed(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """Like `passed`, without blocking the event loop."""
        async for chunk in aand_end(chunks):
            if self._stream.add(chunk):
                self.violation = await self._judge.acheck(self._said_so_far())
                for released in self._released():
                    yield released
                if self.violation:
                    return

    def _said_so_far(self) -> list[Part]:
        return [self._asked(self._stream.together())]

    def _released(self) -> list[str]:
        return [self._judge.violation_message] if self.violation else self._stream.release()


def only(text: str) -> Iterator[str]:
    """A stream of one chunk."""
    yield text


async def aonly(text: str) -> AsyncIterator[str]:
    """An asynchronous stream of one chunk."""
    yield text


def part(content: Content) -> Part:
    """A content by itself."""
    return Part(content.kind, content, ())


def asked_of_nodes(nodes: Sequence[NodeWithScore], query: str) -> list[Part]:
    """Each node as the model sees it."""
    return [Part("document", node_content(node.node, query), ()) for node in nodes]


def turns_of(messages: Sequence[ChatMessage]) -> tuple[Turn, ...]:
    """What was said before."""
    return tuple(map(turn_of, said_of(messages)))


def said_of(messages: Sequence[ChatMessage]) -> list[Said]:
    """A conversation's messages; system messages are the developer's."""
    kinds = ((_KINDS.get(message.role, "response"), message) for message in messages)
    return [Said(kind, _text(message)) for kind, message in kinds if kind is not None]


def asked_of_message(kind: ContentKind, message: ChatMessage, history: tuple[Turn, ...]) -> list[Part]:
    """A message as a content of this kind, if it says anything; and why it can't be judged, if it isn't all text.

    Its tool calls are left out: they are judged by themselves.
    """
    said = _text(message, with_calls=False)
    contents: list[Content | UnreadableContent | None] = [
        Content(kind, said.text, history=history) if said.text.strip() else None,
        said.unreadable,
    ]
    return [Part(kind, content, ()) for content in contents if content is not None]


def _text(message: ChatMessage, *, with_calls: bool = True) -> Text:
    # Providers leave reasoning, refusals and older forms of tool calls beside the blocks.
    left_out = _SIGNATURES if with_calls else _SIGNATURES | set(_CALLS)
    more = {key: value for key, value in message.additional_kwargs.items() if key not in left_out}
    more.pop("tool_call_id", None)
    if "tool_calls" in more:
        more["tool_calls"] = json.dumps(more["tool_calls"], ensure_ascii=False, default=str)
    return text_of([*blocks_of(message.blocks, with_calls=with_calls), more])


def blocks_of(blocks: Sequence[Any], *, with_calls: bool = True) -> list[Any]:
    """Blocks in the form that `text_of` takes."""
    return [_block(block, with_calls) for block in blocks]


def _block(block: Any, with_calls: bool) -> Any:
    kind = str(getattr(block, "block_type", type(block).__name__))
    match kind:
        case "text":
            return block.text
        case "cache":
            return ""
        case "tool_call":
            return f"{block.tool_name}({_json(block.tool_kwargs)})" if with_calls else ""
        case "thinking":
            info = {
                key: value for key, value in block.additional_information.items() if key not in _SIGNATURES
            }
            return {**info, "type": kind, "thinking": block.content or ""}
        case "citable" | "citation":
            nested = block.content if kind == "citable" else [block.cited_content]
            named = [str(block.title or ""), str(block.source or "")]
            return [*named, *(_block(one, with_calls) for one in nested)]
        case "image" | "audio" | "video":
            return {"type": kind, "url": kind}
    return {"type": "file", "file_id": kind}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
