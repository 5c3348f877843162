"""The guided-reasoning prompt: policy and instructions first, byte-identical from call to call, content last.

The structure is RSafe's (arXiv 2506.07736): task, categories between markers, conversation between markers, the
thought in `<think>` tags, the answer in a box. The wording stands in `templates/rsafe.jinja`, and a user can
replace it.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jinja2 import StrictUndefined, Template
from jinja2 import TemplateError as JinjaError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment

from rsafe_plugins.backends.base import Message
from rsafe_plugins.errors import TemplateError
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.neutralize import neutralize
from rsafe_plugins.policy import Category, ContentKind, Policy

Thinking = Literal["open", "skip"]
"""`open`: the template leaves it to the guard whether the model thinks (it begins the answer for it, so one
prompt serves both ways). `skip`: the template asks for the bare verdict, for engines whose answer can't be begun."""

_PLACE = f"conversation-{uuid.uuid4()}"  # nothing that a policy or a template could hold
_SPEAKERS = {"user": "User", "agent": "Agent"}
TITLES: dict[ContentKind, str] = {
    "prompt": "User",
    "response": "Agent",
    "document": "Document",
    "tool_call": "Tool call",
    "tool_result": "Tool result",
}
_DELIMITER = re.compile(r"<[^<>\n]{1,64}>|\[[/A-Z_ ]{2,40}\]")


@lru_cache(maxsize=32)
def _compiled(text: str) -> tuple[Template, bool]:
    """The template, and whether it takes `turns`."""
    environment = SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, undefined=StrictUndefined
    )
    return environment.from_string(text), "turns" in find_undeclared_variables(environment.parse(text))


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template makes of a policy: the text before and after the conversation, and what content can't write."""

    before: str
    after: str
    delimiters: tuple[str, ...]


class GuardPrompt:
    """Builds the guard's prompt from a policy and a content.

    Args:
        template: A Jinja template file; None for RSafe's structure in our wording. It sees `categories` (each
            with `id`, `name`, `description`, `covers`, `allows`, `examples`, `allowed_examples`), `policy` (its name),
            `kind` (`prompt`, `response`, `document`, `tool_call`, `tool_result`), `reasoning` (`open` or `skip`) and
            the conversation: either `conversation`, with a line for each turn, which must stand in it exactly once; or
            `turns` (each with `title`, such as User, Agent or Tool result, `name` of the tool, and `text`) for another
            form. What it makes is one user message.
        delimiters: What content can't write beside the template's own tags, such as what an answer begins with.

    Raises:
        TemplateError: The file can't be read or isn't a Jinja template; what else is wrong with it shows in use.
    """

    def __init__(self, template: str | Path | None = None, delimiters: tuple[str, ...] = ()) -> None:
        self._more_delimiters = delimiters
        self.source = str(template) if template is not None else "the built-in template"
        self._text = _read(template)
        try:
            self._template, self._takes_turns = _compiled(self._text)
        except JinjaError as error:
            raise TemplateError(f"{self.source} is not a Jinja template: {error}.") from error
        # Bound to the instance, so that a template's cache goes when the template goes.
        self._frame = lru_cache(maxsize=512)(self._render_frame)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self._text.encode("utf-8")).hexdigest()

    @cached_property
    def delimiters(self) -> tuple[str, ...]:
        """The tags that structure this template; content can't write them."""
        return tuple(sorted({*_DELIMITER.findall(self._text), *self._more_delimiters}))

    def messages(self, policy: Policy, content: Content, thinking: Thinking = "open") -> tuple[Message, ...]:
        """The chat for one content under those categories of the policy that apply to its kind.

        Raises:
            PolicyError: No category of the policy applies to this kind of content.
            TemplateError: The template fails on this policy or kind, or doesn't hold the conversation once.
        """
        static = 0
        frame = self._frame(policy, content.kind, thinking)
        said = turns(content, frame.delimiters, headings=self._takes_turns)
        if self._takes_turns:
            text = self._render(policy, content.kind, thinking, turns=said)
        else:
            text = frame.before + "\n".join(map(line, said)) + frame.after
            static = len(frame.before)
        return (Message("user", text, static),)

    def _safe(self, text: str) -> str:
        return neutralize(text, self.delimiters)

    def _render_frame(self, policy: Policy, kind: ContentKind, thinking: Thinking) -> _Frame:
        """What stands around the conversation, with the tags that only show when the template is filled in."""
        if self._takes_turns:
            # Turns of everybody, so that whatever the template puts around one stands there.
            places = [{"title": title, "name": "", "text": _PLACE} for title in TITLES.values()]
            text = self._render(policy, kind, thinking, turns=places)
            heads = (row.partition(_PLACE)[0].strip() for row in text.splitlines())
            headings = [head for head in heads if any(title in head for title in TITLES.values())]
            # A title alone, or with a colon, is known as such at the beginning of a line.
            own = [head for head in headings if head.rstrip(" :") not in TITLES.values()]
            return _Frame("", "", self._with(_DELIMITER.findall(text), own))
        text = self._render(policy, kind, thinking, conversation=_PLACE)
        parts = text.split(_PLACE)
        if len(parts) != 2:
            raise TemplateError(
                f"{self.source} must hold {{{{ conversation }}}} exactly once; for a {kind} it stands there "
                f"{len(parts) - 1} times."
            )
        return _Frame(parts[0], parts[1], self._with(_DELIMITER.findall(text)))

    def _with(self, *more: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({*self.delimiters, *chain(*more)}))

    def _render(self, policy: Policy, kind: ContentKind, thinking: Thinking, **conversation: Any) -> str:
        categories = [self._safe_category(category) for category in policy.for_kind(kind).categories]
        try:
            return self._template.render(
                categories=categories,
                policy=self._safe(policy.name),
                kind=kind,
                reasoning=thinking,
                **conversation,
            )
        except (
            JinjaError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise TemplateError(f"{self.source} can't be rendered for a {kind}: {error}.") from error

    def _safe_category(self, category: Category) -> dict[str, Any]:
        """The category's fields for the template; their own limits on length don't count marks."""
        return {
            "id": category.id,
            "name": self._safe(category.name),
            "description": self._safe(category.description),
            "covers": [self._safe(text) for text in category.covers],
            "allows": [self._safe(text) for text in category.allows],
            "examples": [self._quoted(text) for text in category.examples],
            "allowed_examples": [self._quoted(text) for text in category.allowed_examples],
        }

    def _quoted(self, text: str) -> str:
        """An example, which can't end the quotes that it stands in."""
        return self._safe(text).replace('"', "'")


def turns(
    content: Content, delimiters: tuple[str, ...] = (), *, headings: bool = False
) -> list[dict[str, str]]:
    """The conversation, what is judged last: `title`, `name` (of a tool) and `text` of each turn, neutralized."""

    def turn(title: str, text: str, name: str = "") -> dict[str, str]:
        # A name stays in its line.
        named = " ".join(neutralize(name, delimiters, headings=headings).split())
        return {"title": title, "name": named, "text": neutralize(text, delimiters, headings=headings)}

    said = [turn(_SPEAKERS[one.speaker], one.text) for one in content.history]
    is_tool = content.kind in ("tool_call", "tool_result")
    if content.context and not is_tool:
        said.append(turn("User", content.context))
    said.append(turn(TITLES[content.kind], content.text, content.context if is_tool else ""))
    return said


def line(turn: dict[str, str]) -> str:
    """A turn as text."""
    title = f"{turn['title']} ({turn['name']})" if turn["name"] else turn["title"]
    return f"{title}: {turn['text']}"


def _read(template: str | Path | None) -> str:
    if template is None:
        return (
            resources.files("rsafe_plugins.guard")
            .joinpath("templates/rsafe.jinja")
            .read_text("utf-8")
            .strip()
        )
    try:
        return Path(template).read_text("utf-8")
    except OSError as error:
        raise TemplateError(f"The template {template} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TemplateError(f"The template {template} is not UTF-8 (byte {error.start}).") from error
