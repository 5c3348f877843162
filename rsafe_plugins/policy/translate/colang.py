"""Colang flows that refuse, read by NeMo Guardrails' own parser; nothing of the flows is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule

_REFUSES = re.compile(
    r"\b(?:refuse|decline|reject|deny|block|cannot|can['\u2019 ]?t|unable|not able|won['\u2019 ]?t|not allowed|"
    r"inappropriate|don['\u2019 ]?t (?:talk|discuss|answer|engage)|forbid|disallow|inform cannot)\w*\b",
    re.IGNORECASE,
)
_ASKS = re.compile(r"^(?:user\s+)?(?:asks?|asked|request(?:s|ed)?)\s+(?:(?:a\s+)?question\s+)?(?:about\s+)?")
_SAYS = ("bot say", "bot inform")


@dataclass(slots=True)
class Flows:
    """What the Colang files of a config say: intents with examples, what the bot says, and which follows which."""

    intents: dict[str, list[Piece]] = field(default_factory=dict)
    says: dict[str, list[Piece]] = field(default_factory=dict)
    answers: list[tuple[list[str], list[str], Piece]] = field(default_factory=list)


def parse(text: str, file: str, version: str, flows: Flows) -> None:
    """Reads one Colang file.

    Args:
        text: Its text.
        file: Its name.
        version: `1.0` or `2.x`.
        flows: What it says is added here.

    Raises:
        PolicyError: NeMo Guardrails isn't installed, or it can't read the file.
    """
    try:
        from nemoguardrails.colang import parse_colang_file
    except ImportError:
        raise PolicyError(
            'Colang is read by NeMo Guardrails\' own parser: pip install "rsafe-plugins[nemo]".'
        ) from None
    try:
        parsed = parse_colang_file(file, text, version=version)
    except RecursionError:
        raise PolicyError(f"{file}: this Colang is nested too deeply.") from None
    except Exception as error:
        # The parser raises whatever comes up, and its messages run over many lines.
        line = getattr(error, "line", None)
        where = f"{file}, line {line}" if isinstance(line, int) and line > 0 else file
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise PolicyError(f"{where}: this is no Colang {version} ({said[:200]}).") from None
    if version == "1.0":
        _read_1(parsed, text, file, flows)
    else:
        _read_2(parsed, text, file, flows)


def refusals(draft: Draft, flows: Flows) -> list[Entry]:
    """Adds a category for each intent that the bot answers with a refusal.

    Returns:
        The other intents, what the bot says, and the refusals' texts.
    """
    others: list[Entry] = []
    refused: dict[str, Piece] = {}
    for intents, said, piece in flows.answers:
        texts = [*said, *(one.text for name in said for one in flows.says.get(name, ()))]
        if any(_REFUSES.search(text) for text in texts):
            refused.update(dict.fromkeys(intents, piece))
    for name, examples in flows.intents.items():
        if name in refused:
            topic = _ASKS.sub("", name)
            rule = Rule(_capital(topic), refused[name], description=f"The user asks about {topic}.")
            rule.examples += [(piece.text, piece) for piece in examples]
            draft.rules.append(rule)
        else:
            reason = f"an example of the intent '{name}', which no flow refuses"
            others += [Entry(piece, reason=reason) for piece in examples]
    for name, replies in flows.says.items():
        reason = "what the bot says when it refuses" if _REFUSES.search(name) else "what the bot says"
        others += [Entry(piece, reason=f"{reason}; keep it in your flows") for piece in replies]
    return others


def _read_1(parsed: Mapping[str, Any], text: str, file: str, flows: Flows) -> None:
    for kind, into in (("user_messages", flows.intents), ("bot_messages", flows.says)):
        for name, texts in parsed.get(kind, {}).items():
            into.setdefault(name, []).extend(_found(one, text, file) for one in texts)
    for flow in parsed.get("flows", ()):
        intents: list[str] = []
        said: list[str] = []
        piece: Piece | None = None
        for element in flow.get("elements", ()):
            mapping = element.get("_source_mapping") or {}
            line = int(mapping.get("line_number") or 0)
            if element.get("_type") == "UserIntent" and not said:
                intents.append(str(element.get("intent_name")))
                piece = piece or Piece(str(mapping.get("line_text") or intents[-1]), file, line)
            elif element.get("action_name") == "utter":
                said.append(str((element.get("action_params") or {}).get("value")))
        if intents and said and piece:
            flows.answers.append((intents, said, piece))


def _read_2(parsed: Mapping[str, Any], text: str, file: str, flows: Flows) -> None:
    for flow in parsed.get("flows", ()):
        called = list(_called(flow.elements))
        said_by_user = [
            _unquoted(argument) for name, argument, _ in called if name == "user said" and argument
        ]
        said_by_bot = [_unquoted(argument) for name, argument, _ in called if name in _SAYS and argument]
        if flow.name.startswith("user "):
            flows.intents.setdefault(flow.name, []).extend(_found(one, text, file) for one in said_by_user)
        elif flow.name.startswith("bot "):
            flows.says.setdefault(flow.name, []).extend(_found(one, text, file) for one in said_by_bot)
        else:
            intents = [name for name, _, _ in called if name.startswith("user ") and name != "user said"]
            answers = [name for name, _, _ in called if name.startswith("bot ")]
            line = next((line for name, _, line in called if name in intents), 0)
            if intents and answers:
                flows.answers.append((intents, [*answers, *said_by_bot], Piece(flow.name, file, line)))
            elif said_by_user and (answers or said_by_bot):
                flows.intents.setdefault(flow.name, []).extend(
                    _found(one, text, file) for one in said_by_user
                )
                flows.answers.append(([flow.name], [*answers, *said_by_bot], Piece(flow.name, file, line)))


def _called(elements: Any) -> Iterator[tuple[str, str, int]]:
    """The flows that a flow's elements await or start, with their first argument and line."""
    stack = list(elements or ())[::-1]
    line = 0
    while stack:
        element = stack.pop()
        if isinstance(element, Mapping):
            stack.extend(list(element.get("elements") or ())[::-1])
            continue
        source = getattr(element, "_source", None)
        line = int(getattr(source, "line", 0) or line)
        for attribute in ("spec", "then_elements", "else_elements", "elements"):
            inner = getattr(element, attribute, None)
            stack.extend(
                list(inner)[::-1] if isinstance(inner, list) else [inner] if inner is not None else []
            )
        name = getattr(element, "name", None)
        if isinstance(name, str) and getattr(element, "spec_type", None) is not None:
            arguments = getattr(element, "arguments", None) or {}
            yield name, str(arguments.get("$0", "")), line


def _unquoted(argument: str) -> str:
    return argument.strip().strip("\"'")


def _found(said: str, text: str, file: str) -> Piece:
    """An example's piece; the parsers tell no line for it."""
    offset = text.find(said)
    return Piece(said, file, text.count("\n", 0, offset) + 1 if offset >= 0 else 0)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
