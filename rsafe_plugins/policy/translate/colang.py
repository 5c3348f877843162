"""Colang flows that refuse, read by NeMo Guardrails' own parser; nothing of the flows is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule, capital

_REFUSAL = re.compile(r"^(?:bot\s+)?(?:refuse|decline|den(?:y|ies)|inform\s+cannot)", re.IGNORECASE)
_REFUSES = re.compile(
    r"\b(?:I|we)\s*(?:cannot|can\s+not|(?:ca|wo|do)n['\u2019]?t|(?:can|won|don) t|will\s+not|do\s+not|"
    r"(?:\s*am|\s*are|['\u2019]?\s?m|['\u2019]?\s?re)\s+(?:not\s+able|unable)\s+to)\s+"
    r"(?:(?:really|currently|also)\s+)?"
    r"(?:help|discuss|talk|answer|assist|provide|engage|support|respond|comment|speak|give|share|do\s+(?:that|this))\b",
    re.IGNORECASE,
)
_ASKS = re.compile(r"^(?:user\s+)?(?:asks?|asked|request(?:s|ed)?)\s+(?:(?:a\s+)?question\s+)?(?:about\s+)?")
_SAYS = ("bot say", "bot inform")
Said = tuple[str, bool]  # a name or a text, and whether it is a text


@dataclass(slots=True)
class Flows:
    """What the Colang files of a config say: intents with examples, what the bot says, and which follows which."""

    intents: dict[str, list[Piece]] = field(default_factory=dict)
    says: dict[str, list[Piece]] = field(default_factory=dict)
    answers: list[tuple[list[str], list[Said], Piece]] = field(default_factory=list)
    inline: list[Piece] = field(default_factory=list)


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
    try:
        (_read_1 if version == "1.0" else _read_2)(parsed, text, file, flows)
    except RecursionError:
        raise PolicyError(f"{file}: this Colang is nested too deeply.") from None


def refusals(draft: Draft, flows: Flows) -> list[Entry]:
    """Adds a category for each intent that the bot answers with a refusal.

    Returns:
        The other intents, what the bot says, and the refusals' texts.
    """
    others: list[Entry] = []
    refused: dict[str, Piece] = {}
    for intents, said, piece in flows.answers:
        if any(_refuses(flows, *one) for one in said):
            refused.update((intent, piece) for intent in intents if intent not in refused)
    for name, examples in {
        **flows.intents,
        **{name: flows.intents.get(name, []) for name in refused},
    }.items():
        if name in refused:
            topic = _ASKS.sub("", name)
            rule = Rule(capital(topic), refused[name], description=f"The user asks about {topic}.")
            rule.examples += [(piece.text, piece) for piece in examples]
            draft.rules.append(rule)
        else:
            reason = f"an example of the intent '{name}', which no flow refuses"
            others += [Entry(piece, reason=reason) for piece in examples]
    for name, replies in flows.says.items():
        reason = "what the bot says when it refuses" if _refuses(flows, name, False) else "what the bot says"
        others += [Entry(piece, reason=f"{reason}; keep it in your flows") for piece in replies]
    others += [Entry(piece, reason="what the bot says; keep it in your flows") for piece in flows.inline]
    return others


def _refuses(flows: Flows, said: str, is_text: bool) -> bool:
    if is_text:
        return bool(_REFUSES.search(said))
    return bool(_REFUSAL.match(said)) or any(_REFUSES.search(one.text) for one in flows.says.get(said, ()))


def _read_1(parsed: Mapping[str, Any], text: str, file: str, flows: Flows) -> None:
    for kind, into in (("user_messages", flows.intents), ("bot_messages", flows.says)):
        for name, texts in parsed.get(kind, {}).items():
            into.setdefault(name, []).extend(_found(one, text, file) for one in texts)
    for flow in parsed.get("flows", ()):
        intent: str = ""
        said: list[Said] = []
        piece = Piece("", file)
        for element in flow.get("elements", ()):
            mapping = element.get("_source_mapping") or {}
            line = int(mapping.get("line_number") or 0)
            kind = element.get("_type")
            if kind in ("UserIntent", "if", "branch", "jump", "while"):
                # A turn ends here: what the bot says below is no answer to the intent before.
                if intent and said:
                    flows.answers.append(([intent], said, piece))
                intent, said = "", []
            if kind == "UserIntent":
                intent = str(element.get("intent_name"))
                piece = Piece(str(mapping.get("line_text") or intent).strip(), file, line)
                if element.get("_is_example"):
                    flows.intents.setdefault(intent, []).append(Piece(intent, file, line))
            elif element.get("action_name") == "utter":
                value = (element.get("action_params") or {}).get("value")
                inline = value.get("text") if isinstance(value, Mapping) else None
                said.append((str(value), False) if inline is None else (str(inline), True))
                if inline is not None:
                    flows.inline.append(Piece(str(inline), file, line))
        if intent and said:
            flows.answers.append(([intent], said, piece))


def _read_2(parsed: Mapping[str, Any], text: str, file: str, flows: Flows) -> None:
    for flow in parsed.get("flows", ()):
        if flow.name.startswith(("user ", "bot ")):
            says = ("user said",) if flow.name.startswith("user ") else _SAYS
            into = flows.intents if flow.name.startswith("user ") else flows.says
            texts = [
                _unquoted(argument)
                for name, argument, _ in _called(flow.elements)
                if name in says and argument
            ]
            into.setdefault(flow.name, []).extend(_found(one, text, file) for one in texts)
            continue
        for users, bots in _turns(flow.elements):
            said = [
                (_unquoted(text), True) if name in _SAYS and text else (name, False) for name, text, _ in bots
            ]
            flows.inline += [_found(one, text, file) for one, is_text in said if is_text]
            intents = [name for name, _, _ in users if name != "user said"]
            if texts := [
                _unquoted(argument) for name, argument, _ in users if name == "user said" and argument
            ]:
                intents.append(flow.name)
                flows.intents.setdefault(flow.name, []).extend(_found(one, text, file) for one in texts)
            if intents and said:
                flows.answers.append((intents, said, Piece(flow.name, file, users[0][2])))


Call = tuple[str, str, int]


def _turns(elements: Any) -> Iterator[tuple[list[Call], list[Call]]]:
    """What users say, with what the bot says to it, up to the next thing that users say or the next branch."""
    users: list[Call] = []
    bots: list[Call] = []
    for element in elements or ():
        branches: list[tuple[Any, Any]] = []
        if specs := getattr(element, "when_specs", None):
            branches += zip(specs, element.then_elements, strict=False)
            branches.append((None, element.else_elements))
        elif hasattr(element, "then_elements"):
            branches += [(None, element.then_elements), (None, element.else_elements)]
        elif isinstance(getattr(element, "elements", None), list):
            branches.append((None, element.elements))
        calls = [] if branches else list(_called([element]))
        asked = [call for call in calls if call[0].startswith("user ")]
        if asked or branches:
            yield users, bots
            users, bots = asked, []
        bots += [call for call in calls if call[0].startswith("bot ")]
        for spec, inner in branches:
            first = [call for call in _called([spec]) if call[0].startswith("user ")] if spec else []
            turns = _turns(inner)
            _, answers = next(turns, ([], []))
            yield first, answers
            yield from turns
    yield users, bots


def _called(elements: Any) -> Iterator[tuple[str, str, int]]:
    """The flows that a flow's elements await or start, with their first argument and line."""
    stack = list(elements or ())[::-1]
    line = 0
    while stack:
        element = stack.pop()
        if isinstance(element, list):
            stack.extend(element[::-1])
            continue
        if isinstance(element, Mapping):
            stack.extend(list(element.get("elements") or ())[::-1])
            continue
        source = getattr(element, "_source", None)
        line = int(getattr(source, "line", 0) or line)
        for attribute in ("spec", "when_specs", "then_elements", "else_elements", "elements"):
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
