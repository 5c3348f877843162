"""What the guard needs to know of a guard model: how it is asked, and how it answers."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from rsafe_plugins.backends.base import Message
from rsafe_plugins.errors import PolicyError, VerdictError
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.neutralize import neutralize
from rsafe_plugins.guard.prompt import Thinking
from rsafe_plugins.guard.verdict import Answer, Label
from rsafe_plugins.policy import Policy


@dataclass(frozen=True, slots=True)
class Thought:
    """How a model thinks before it answers.

    Attributes:
        open: What its answer begins with then.
        close: What ends the thought.
        then: What stands between the closed thought and the label.
    """

    open: str
    close: str
    then: str


class Dialect(abc.ABC):
    """One family of guard models.

    Attributes:
        name: As `Guard(dialect=...)` takes it.
        models: Finds the family's name in a model's name.
        labels: What the model writes for its verdict, and what each means. None is the beginning of another, and
            several may mean the same. Empty where a verdict has no place that could be scored.
        begin: What a bare answer begins with before the label.
        thought: How it thinks; None where it doesn't.
        naming: What the answer to unsafe content begins with before its categories; None where it names none.
        form: The whole answer, with the groups `label`, and where it has them `thought` and `categories`.
        expects: That form in words, for messages.
        own_chat: Whether the model's chat template is the guard's prompt, so that a begun answer can't stand in the
            chat as a message: it would be judged.
        one_category: Whether the model is asked for one category at a time.
        by_category: The dialect in which a model of this one may be asked about one category at a time, by name; None
            where there is none.
        mode_in_prompt: Whether the prompt itself says if the model shall think.
        answer_tokens: Room for an answer without its thought.
        stop: What ends an answer that is generated.
        enough: What a generated answer may end with, since nothing after it counts; None where all of it does.
        delimiters: What structures the prompt and the answer; content can't write it.
        digest: Changes where the dialect of a user's file does; empty for those that are known by name.
    """

    name: str
    models: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    labels: Mapping[str, Label]
    begin: str = ""
    thought: Thought | None = None
    naming: str | None = None
    form: re.Pattern[str]
    expects: str
    own_chat: bool = False
    one_category: bool = False
    by_category: str | None = None
    mode_in_prompt: bool = False
    answer_tokens: int = 64
    stop: tuple[str, ...] = ()
    enough: re.Pattern[str] | None = None
    delimiters: tuple[str, ...] = ()
    digest: str = ""

    @abc.abstractmethod
    def messages(self, policy: Policy, content: Content, thinking: Thinking = "open") -> tuple[Message, ...]:
        """The chat for one content.

        Raises:
            PolicyError: The policy or the model isn't for this kind of content.
            TemplateError: The prompt's template fails.
        """

    def template_args(self, policy: Policy, content: Content) -> Mapping[str, Any]:
        """What the model's chat template is given beside the chat."""
        return {}

    def parse(self, text: str, *, thinking: bool | None = None) -> Answer:
        """Reads the model's whole answer; never a guess.

        Args:
            text: What the model generated.
            thinking: True if there must be a thought, False if there must be none, None if either will do.

        Raises:
            VerdictError: It has another form.
        """
        found = self.form.fullmatch(text.strip())
        if found is None:
            raise VerdictError(f"Expected {self.expects}; the answer has another form.")
        groups = found.groupdict()
        thought = (groups.get("thought") or "").strip() or None
        if thinking is True and thought is None:
            raise VerdictError("Expected a thought before the verdict; the answer has none.")
        if thinking is False and thought is not None:
            raise VerdictError("Expected the bare verdict; the answer holds a thought.")
        means = {spelling.strip().casefold(): label for spelling, label in self.labels.items()}
        label, named = means[groups["label"].casefold()], (groups.get("categories") or "").strip()
        if label == "safe" and named.strip(" .").casefold() not in ("", "none", "n/a"):
            raise VerdictError("Expected no categories beside a safe verdict; the answer names some.")
        return Answer(label, thought, f"Categories: {named}" if named else "")


class ChatDialect(Dialect):
    """A guard whose chat template makes the prompt, from the conversation that it judges: its last message."""

    own_chat = True

    def messages(self, policy: Policy, content: Content, thinking: Thinking = "open") -> tuple[Message, ...]:
        """The conversation itself."""
        policy.for_kind(content.kind)
        if content.kind not in ("prompt", "response"):
            raise PolicyError(
                f"A guard of the dialect {self.name} judges prompts and responses, not content of the kind "
                f"{content.kind}; use another guard for that."
            )
        return conversation(content, self.delimiters)


def conversation(content: Content, delimiters: tuple[str, ...] = ()) -> tuple[Message, ...]:
    """Prompt or response with the earlier turns as a chat, its structure neutralized."""
    chat = history(content, delimiters)
    if content.kind == "response":
        chat.append(Message("user", neutralize(content.context, delimiters)))
        chat.append(Message("assistant", neutralize(content.text, delimiters)))
    else:
        chat.append(Message("user", neutralize(content.text, delimiters)))
    return alternating(chat)


def history(content: Content, delimiters: tuple[str, ...]) -> list[Message]:
    """The earlier turns, neutralized."""
    return [
        Message("user" if turn.speaker == "user" else "assistant", neutralize(turn.text, delimiters))
        for turn in content.history
    ]


def alternating(chat: Iterable[Message]) -> tuple[Message, ...]:
    """The chat as templates demand it: the user first, then each in turn."""
    runs = [(role, list(run)) for role, run in groupby(chat, lambda message: message.role)]
    if runs[0][0] == "assistant":
        runs = runs[1:]
    return tuple(Message(role, "\n".join(message.content for message in run)) for role, run in runs)


def description(policy: Policy) -> str:
    """A policy as lines of text, one a category."""
    lines = []
    for category in policy.categories:
        line = f"{category.id}: {category.name}. {category.description}".rstrip()
        if category.covers:
            line += f" Unsafe: {'; '.join(category.covers)}."
        if category.allows:
            line += f" Allowed: {'; '.join(category.allows)}."
        lines.append(neutralize(line))
    return "\n".join(lines)
