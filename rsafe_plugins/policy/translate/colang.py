"""Colang flows that refuse, read by NeMo Guardrails' own parser; nothing of the flows is run."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule, capital

_REFUSAL = re.compile(
    r"^(?:bot\s+)?(?:refuse|reject|decline|den(?:y|ies)(?:$|\s+(?:to|request|that|this|it|access|help|answer))|"
    r"(?:inform|express|explain|say)\s+(?:cannot|can't|unable|inability|no\s*$|no\s+(?:opinion|comment|help|advice|answer)))",
    re.IGNORECASE,
)
# What may be a refusal by its name, or tell something: "bot deny being human", "bot inform no shipping fees".
_PERHAPS_REFUSAL = re.compile(
    r"^(?:bot\s+)?(?:den(?:y|ies)|(?:inform|express|explain|say)\s+no\b(?!\s+(?:problem|worries)))",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"\b(?:I|we)\s*(?:cannot|can\s+not|(?:ca|wo|do)n['\u2019]?t|(?:can|won|don) t|will\s+not|do\s+not|"
    r"(?:\s*am|\s*are|['\u2019]?\s?m|['\u2019]?\s?re)\s+(?:not\s+(?:able|allowed|authori[sz]ed|permitted|qualified)|unable)"
    r"\s+to|(?:\s+would|['\u2019]?d)\s+(?:rather|prefer)\s+not(?:\s+to)?|(?:do\s+not|don['\u2019]?t)\s+(?:like|want)\s+to)\s+"
    r"(?:(?:really|currently|also)\s+)?"
    r"(?:help|discuss|talk|answer|assist|engage|respond|comment|advise|comply|process|handle|continue|do\s+(?:that|this)|"
    r"(?:provide|support|give|share|speak\s+(?:about|on|of))\s+(?:(?:you|with|on|about)\s+)*(?:that|this|these|those|such|any|"
    r"(?:\w+\s+){0,3}(?:advice|opinions?|information|instructions|details|recommendations?|guidance|help|assistance)))\b|"
    r"\b(?:topic|question|request|subject)\s+(?:is|are)\s*(?:not|n['\u2019]?t)\s+(?:supported|allowed|permitted)\b|"
    r"\bnot\s+something\s+(?:(?:that\s+)?(?:I|we)\s+can|to\s+(?:discuss|talk))\b|\boff[\s-]limits\b|"
    r"\b(?:I|we)\s+(?:must|have\s+to|need\s+to)\s+(?:stay\s+away|decline|refuse|refrain)\b|"
    r"\b(?:beyond|outside)\s+(?:of\s+)?(?:my|our)\s+(?:scope|remit)\b|"
    r"\bagainst\s+(?:my|our)\s+(?:policy|policies|rules)\b",
    re.IGNORECASE,
)
# What may be one, or tell what a product doesn't do: "We do not share your data."
_PERHAPS_REFUSES = re.compile(
    r"\b(?:I|we)\s*(?:cannot|can\s+not|(?:ca|wo|do)n['\u2019]?t|will\s+not|do\s+not)\s+(?:\w+\s+)?"
    r"(?:provide|support|speak|give|share)\b",
    re.IGNORECASE,
)
_ANY_INTENT = re.compile(r"^(?:user\s+)?\.{3}$")
_ASKS = re.compile(r"^(?:user\s+)?(?:asks?|asked|request(?:s|ed)?)\s+(?:(?:a\s+)?question\s+)?(?:about\s+)?")
_UTTERANCE = "UtteranceBotAction"
_SAYS = ("bot say", "bot inform", _UTTERANCE)
Said = tuple[str, bool]  # a name or a text, and whether it is a text
Element = Mapping[str, Any]
Refuses = Callable[["Flows", str, bool], bool]


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow of Colang 1.0.

    Attributes:
        name: What it is called.
        file: The file it stands in.
        elements: The parser's elements, one after the other.
        following: For each element, where the flow may go on after it.
    """

    name: str
    file: str
    elements: Sequence[Element]
    following: Sequence[Sequence[int]]


@dataclass(slots=True)
class Flows:
    """What the flows of a config say.

    Attributes:
        intents: The examples of what users say, by the intent's name.
        says: The texts of what the bot says, by its name.
        inline: Texts that the bot says without a name.
        flows: The flows of Colang 1.0.
        patterns: What stands for what users say as a pattern.
        answers: Of the flows of Colang 2.x: intents, what the bot may say to them, where, and whether a condition
            stands between.
        helpers: Of the other flows of Colang 2.x: what the bot says in them, by the flow's name.
    """

    intents: dict[str, list[Piece]] = field(default_factory=dict)
    says: dict[str, list[Piece]] = field(default_factory=dict)
    inline: list[Piece] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    patterns: list[Piece] = field(default_factory=list)
    answers: list[tuple[list[str], list[Said], Piece, bool]] = field(default_factory=list)
    helpers: dict[str, list[Said]] = field(default_factory=dict)


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
        raise _no_parser() from None
    with _one_sentence(file, version):
        parsed = parse_colang_file(file, text, version=version)
        (_read_1 if version == "1.0" else _read_2)(parsed, text, file, flows)


def parse_steps(steps: Sequence[Any], file: str, name: str, flows: Flows) -> None:
    """Reads a flow of Colang 1.0 that is written as YAML.

    Args:
        steps: Its elements. What has a line says so under `_source_mapping`, and where it stands under its `key`.
        file: The file it stands in.
        name: What the flow is called.
        flows: What it says is added here.

    Raises:
        PolicyError: NeMo Guardrails isn't installed, or it can't read the steps.
    """
    try:
        from nemoguardrails.colang import parse_flow_elements
    except ImportError:
        raise _no_parser() from None
    with _one_sentence(f"{file}, {name}", "1.0"):
        # As NeMo does it: what has its internal form already is left as it is.
        is_internal = bool(steps) and "_type" in steps[0]
        _read_steps(steps if is_internal else parse_flow_elements(list(steps)), file, name, flows)


def _no_parser() -> PolicyError:
    return PolicyError('Colang is read by NeMo Guardrails\' own parser: pip install "rsafe-plugins[nemo]".')


@contextlib.contextmanager
def _one_sentence(where: str, version: str) -> Iterator[None]:
    """Makes one sentence of whatever the parser raises; its messages run over many lines."""
    try:
        yield
    except RecursionError:
        raise PolicyError(f"{where}: this Colang is nested too deeply.") from None
    except Exception as error:
        line = getattr(error, "line", None)
        at = f"{where}, line {line}" if isinstance(line, int) and line > 0 else where
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise PolicyError(f"{at}: this is no Colang {version} ({said[:200]}).") from None


def refusals(draft: Draft, flows: Flows) -> list[Entry]:
    """Adds a category for each intent that the bot answers with a refusal, be it under a condition.

    Returns:
        The other intents, what the bot says, and the refusals' texts.
    """
    others: list[Entry] = []
    refused: dict[str, tuple[Piece, bool]] = {}
    for intent, piece, is_conditional in (*_refused_1(flows, _refuses), *_refused_2(flows, _refuses)):
        if intent not in refused or (refused[intent][1] and not is_conditional):
            refused[intent] = piece, is_conditional
    perhaps = {
        intent: piece
        for intent, piece, _ in (*_refused_1(flows, _may_refuse), *_refused_2(flows, _may_refuse))
        if intent not in refused
    }
    # Nobody knows whether what answers these refuses.
    others += [Entry(piece) for piece in perhaps.values()]
    for name, examples in {
        **flows.intents,
        **{name: flows.intents.get(name, []) for name in refused},
    }.items():
        if name in refused and _ANY_INTENT.match(name):
            # Whatever the user says is refused under a condition: that is no topic.
            others += [Entry(piece) for piece in (refused[name][0], *examples)]
        elif name in refused:
            topic = _ASKS.sub("", name)
            piece, is_conditional = refused[name]
            rule = Rule(capital(topic), piece, description=f"The user asks about {topic}.")
            rule.remark = "the flow refuses only under a condition" if is_conditional else ""
            rule.examples += [(piece.text, piece) for piece in examples]
            draft.rules.append(rule)
        else:
            reason = "" if name in perhaps else f"an example of the intent '{name}', which no flow refuses"
            others += [Entry(piece, reason=reason) for piece in examples]
    for name, replies in flows.says.items():
        reason = "what the bot says when it refuses" if _refuses(flows, name, False) else "what the bot says"
        others += [Entry(piece, reason=f"{reason}; keep it in your flows") for piece in replies]
    others += [
        Entry(piece, reason="what the bot says; keep it in your flows")
        for piece in dict.fromkeys(flows.inline)
    ]
    others += [
        Entry(piece, reason="a pattern, which your flow matches exactly; keep it") for piece in flows.patterns
    ]
    return others


def _refuses(flows: Flows, said: str, is_text: bool) -> bool:
    return _matches(flows, said, is_text, _REFUSAL, _REFUSES, set())


def _may_refuse(flows: Flows, said: str, is_text: bool) -> bool:
    return _matches(flows, said, is_text, _PERHAPS_REFUSAL, _PERHAPS_REFUSES, set())


def _matches(
    flows: Flows, said: str, is_text: bool, name: re.Pattern[str], text: re.Pattern[str], seen: set[str]
) -> bool:
    """Whether what the bot says matches: a text, or the name of what it says, its texts, or the flows that it calls."""
    if is_text:
        return bool(text.search(said))
    if said in seen:
        return False
    seen.add(said)
    # What a flow of the app does is in its body, whatever its name.
    is_named = bool(name.match(said)) and (said not in flows.helpers or said.startswith("bot "))
    return (
        is_named
        or any(text.search(one.text) for one in flows.says.get(said, ()))
        or any(_matches(flows, *one, name, text, seen) for one in flows.helpers.get(said, ()))
    )


def _read_1(parsed: Mapping[str, Any], text: str, file: str, flows: Flows) -> None:
    for kind, into in (("user_messages", flows.intents), ("bot_messages", flows.says)):
        for name, texts in parsed.get(kind, {}).items():
            into.setdefault(name, []).extend(_found(one, text, file) for one in texts)
    for flow in parsed.get("flows", ()):
        _read_steps(flow.get("elements", ()), file, str(flow.get("id", "")), flows)


def _read_steps(elements: Sequence[Element], file: str, name: str, flows: Flows) -> None:
    flows.flows.append(Flow(name, file, elements, _following(elements)))
    for element in elements:
        if element.get("_is_example"):
            intent = str(element.get("intent_name"))
            flows.intents.setdefault(intent, []).append(_piece(element, intent, file))
        if (said := _said(element)) is not None and said[1]:
            flows.inline.append(_piece(element, said[0], file))


def _said(element: Element) -> Said | None:
    """What the bot says in an element of Colang 1.0."""
    if element.get("action_name") != "utter":
        return None
    value = (element.get("action_params") or {}).get("value")
    return (
        (str(value["text"]), True) if isinstance(value, Mapping) and "text" in value else (str(value), False)
    )


def _piece(element: Element, text: str, file: str) -> Piece:
    mapping = element.get("_source_mapping") or {}
    return Piece(text, file, int(mapping.get("line_number") or 0), str(mapping.get("key", "")))


def _refused_1(flows: Flows, refuses: Refuses) -> Iterator[tuple[str, Piece, bool]]:
    """The intents of Colang 1.0 after which a refusal may come, with whether a condition stands between.

    The elements of all flows are one graph. It is walked from the refusals backwards, up to what users say: that
    takes a time in proportion to its size, however many branches there are.
    """
    elements = [(element, flow.file) for flow in flows.flows for element in flow.elements]
    before, forks = _graph(flows)
    refusing = [
        at for at, (element, _) in enumerate(elements) if (said := _said(element)) and refuses(flows, *said)
    ]
    found: dict[int, bool] = {}
    for through_forks in (False, True):
        reached: set[int] = set()
        left = list(refusing)
        while left:
            for at in before[left.pop()] - reached:
                reached.add(at)
                if elements[at][0].get("_type") == "UserIntent":
                    found.setdefault(at, through_forks)
                elif through_forks or at not in forks:
                    left.append(at)
    for at, is_conditional in sorted(found.items()):
        element, file = elements[at]
        intent = str(element.get("intent_name"))
        text = str((element.get("_source_mapping") or {}).get("line_text") or intent)
        yield intent, _piece(element, text.strip(), file), is_conditional


def _graph(flows: Flows) -> tuple[defaultdict[int, set[int]], set[int]]:
    """What may come before each element, counted through all flows, and the elements with several ways on."""
    firsts = [0, *accumulate(len(flow.elements) for flow in flows.flows)]
    starts = {flow.name: first for flow, first in zip(flows.flows, firsts, strict=False)}
    before: defaultdict[int, set[int]] = defaultdict(set)
    forks: set[int] = set()
    for flow, first in zip(flows.flows, firsts, strict=False):
        for at, (element, following) in enumerate(zip(flow.elements, flow.following, strict=True), first):
            if len(following) > 1:
                forks.add(at)
            for other in following:
                if 0 <= other < len(flow.elements):
                    before[first + other].add(at)
            if element.get("_type") == "flow" and (called := str(element.get("flow_name"))) in starts:
                before[starts[called]].add(at)
    return before, forks


def _following(elements: Sequence[Element]) -> list[list[int]]:
    """For each element of a flow of Colang 1.0, where it may go on; behind the last element it ends."""
    found: list[list[int]] = []
    alternatives_end = 0
    for at, element in enumerate(elements):
        # After one of several alternatives, the others are left out.
        onward = max(at + 1, alternatives_end)
        match element.get("_type"):
            case "jump" if element.get("_absolute"):
                found.append([])
            case "jump":
                found.append([at + int(element["_next"])])
            case "if":
                found.append([at + 1, at + int(element["_next_else"])])
            case "while":
                found.append([at + 1, at + int(element["_next_on_break"])])
            case "break" | "continue" as kind:
                found.append([at + int(element.get(f"_next_on_{kind}", 1))])
            case "branch":
                found.append([at + int(head) for head in element["branch_heads"]])
            case "any":
                alternatives_end = at + 1 + int(element["count"])
                found.append(list(range(at + 1, alternatives_end)))
            case "stop":
                found.append([])
            case _:
                found.append([onward])
    return found


def _refused_2(flows: Flows, refuses: Refuses) -> Iterator[tuple[str, Piece, bool]]:
    for intents, said, piece, is_conditional in flows.answers:
        if any(refuses(flows, *one) for one in said):
            yield from ((intent, piece, is_conditional) for intent in intents)


def _read_2(parsed: Mapping[str, Any], text: str, file: str, flows: Flows) -> None:
    for flow in parsed.get("flows", ()):
        if flow.name.startswith(("user ", "bot ")):
            says = ("user said",) if flow.name.startswith("user ") else _SAYS
            into = flows.intents if flow.name.startswith("user ") else flows.says
            texts = [argument for name, argument, _ in _called(flow.elements) if name in says and argument]
            _take(texts, into.setdefault(flow.name, []), text, file, flows)
            continue
        for users, bots, is_conditional in _turns(flow.elements):
            said = [
                (_unquoted(text), True) if name in _SAYS and text else (name, False) for name, text, _ in bots
            ]
            flows.helpers.setdefault(flow.name, []).extend(said)
            flows.inline += [_found(one, text, file) for one, is_text in said if is_text]
            intents = [name for name, _, _ in users if name != "user said"]
            if texts := [argument for name, argument, _ in users if name == "user said" and argument]:
                intents.append(flow.name)
                _take(texts, flows.intents.setdefault(flow.name, []), text, file, flows)
            if intents and said:
                piece = Piece(flow.name, file, users[0][2])
                flows.answers.append((intents, said, piece, is_conditional))


def _take(arguments: Sequence[str], into: list[Piece], text: str, file: str, flows: Flows) -> None:
    """What is said, as examples; patterns are none."""
    for argument in arguments:
        is_pattern = argument.startswith("regex(")
        (flows.patterns if is_pattern else into).append(_found(_unquoted(argument), text, file))


Call = tuple[str, str, int]


def _turns(
    elements: Any, users: Sequence[Call] = (), is_conditional: bool = False
) -> Iterator[tuple[Sequence[Call], list[Call], bool]]:
    """What users say, with what the bot may say to it before they speak again, and whether only on a condition.

    Args:
        elements: Of a flow of Colang 2.x, or of a branch of one.
        users: What users said before them.
        is_conditional: Whether they stand under a condition.
    """
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
        if branches:
            yield users, bots, is_conditional
            for spec, inner in branches:
                asked = _asked([spec]) if spec else []
                yield from _turns(inner, asked or users, not asked)
            # Where a `when` waited for users, they spoke again; else what follows answers what they said before.
            users, bots, is_conditional = ([] if specs else users), [], True
            continue
        if asked := _asked([element]):
            yield users, bots, is_conditional
            users, bots, is_conditional = asked, [], False
        bots += [call for call in _called([element]) if _may_speak(call[0])]
    yield users, bots, is_conditional


def _may_speak(name: str) -> bool:
    """Whether a call makes the bot speak: an utterance, or any flow that users aren't waited for in."""
    return name == _UTTERANCE or (name[:1].islower() and not name.startswith("user "))


def _asked(elements: Any) -> list[Call]:
    return [call for call in _called(elements) if call[0].startswith("user ")]


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
            yield name, str(arguments.get("$0") or arguments.get("script") or ""), line


def _unquoted(argument: str) -> str:
    return argument.strip().strip("\"'")


def _found(said: str, text: str, file: str) -> Piece:
    """An example's piece; the parsers tell no line for it."""
    offset = text.find(said)
    return Piece(said, file, text.count("\n", 0, offset) + 1 if offset >= 0 else 0)
