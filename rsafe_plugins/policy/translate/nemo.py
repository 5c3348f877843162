"""Config folders of NeMo Guardrails: prompts of its rails, instructions, Colang flows, lists in `rails.config`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files
from rsafe_plugins.policy.model import ContentKind
from rsafe_plugins.policy.translate import colang, guardrails_ai, plain, taxonomy
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule
from rsafe_plugins.policy.translate.prose import (
    BULLET,
    add_sentence,
    forbids_something,
    lines,
    sentences,
    unwrapped,
)
from rsafe_plugins.policy.translate.yaml_tree import Text, at, read_yaml, texts

MOST_FILES = 2_000
_YAML, _COLANG = (".yml", ".yaml"), ".co"
_TASK = re.compile(r"^(?P<name>\w+)(?:\s+\$(?P<parameter>\w+)\s*=\s*(?P<value>\S+))?\s*$")
_SELF_CHECK = {"self_check_input": "input", "self_check_output": "output"}
_CATEGORIES = {
    "content_safety_check_input": "input",
    "content_safety_check_output": "output",
    "llama_guard_check_input": "input",
    "llama_guard_check_output": "output",
}
_KINDS: Mapping[str, tuple[ContentKind, ...]] = {
    "input": ("prompt",),
    "output": ("response",),
    "retrieval": ("document",),
    "tool_input": ("tool_result",),
    "tool_output": ("tool_call",),
    "dialog": ("prompt",),
}
_NOT_POLICY = {
    "self_check_facts": "checks facts, which is no safety policy",
    "self_check_hallucination": "checks for hallucination, which is no safety policy",
    "patronus_lynx_check_output_hallucination": "checks for hallucination, which is no safety policy",
}
# The keys of a config that say how it is run, and what stands beside a prompt's text.
_SETTINGS = frozenset(
    (
        "models",
        "colang_version",
        "import_paths",
        "imported_paths",
        "rails",
        "tracing",
        "metrics",
        "knowledge_base",
        "docs",
        "core",
        "lowest_temperature",
        "enable_multi_step_generation",
        "enable_rails_exceptions",
        "actions_server_url",
        "streaming",
        "passthrough",
        "event_source_uid",
        "prompting_mode",
        "embedding_search_provider",
    )
)
_SETTING_OF = re.compile(
    r"prompts\[\d+\]\.(?!content|messages).*|prompts\[\d+\]\.messages\[\d+\]\.(?:type|role)|instructions\[\d+\]\.type"
)
_RAIL = re.compile(
    r"rails\.(?P<rail>input|output|retrieval|tool_input|tool_output)(?:\.streaming)?\.flows\[\d+\]"
)
# Flows whose rules stand in the config, and are read there.
_READ_RAILS = re.compile(
    r"(?:self check (?:input|output)|content safety check|llama ?guard|topic safety|.*sensitive data|.*\bpii\b|"
    r"guardrails ?ai|rsafe)\b.*",
    re.IGNORECASE,
)
_VALIDATORS = "rails.config.guardrails_ai.validators"
_JUDGED = ("input", "output", "retrieval")
_FORBIDDEN_LIST = re.compile(r"deny|denied|forbid|block|banned|ban_|prohibit|disallow", re.IGNORECASE)
# Imports that hold no rules of the app's own.
_KNOWN_IMPORT = re.compile(
    r"rsafe_plugins\b.*|nemoguardrails\b.*|core|guardrails|llm|avatars|timing|utils|attention|passthrough"
)
_FOLDED = re.compile(r":\s+- \S.* - \S.*")
_CONTROL = re.compile(r"\{[%#].*?[%#]\}", re.DOTALL)
_PLACE = re.compile(r"\{\{.*?\}\}", re.DOTALL)


class Folder:
    """The files of a config, read as text and never run.

    Args:
        path: A config folder, or one of its YAML or Colang files.

    Raises:
        PolicyError: It can't be read, or holds nothing of a config.
    """

    def __init__(self, path: Path) -> None:
        self.root = path if path.is_dir() else path.parent
        names = sorted(_walk(path)) if path.is_dir() else [path]
        self.yaml: dict[str, Any] = {}
        self.colang: dict[str, str] = {}
        for name in names:
            shown = os.path.relpath(name, self.root)
            try:
                text = files.read_text(name).removeprefix("\ufeff")
            except FileNotFoundError:
                raise PolicyError(
                    f"{files.source_name(name)}: this link leads nowhere; mend or remove it."
                ) from None
            if name.suffix == _COLANG:
                self.colang[shown] = text
            else:
                self.yaml[shown] = read_yaml(text, shown)
        if not self.yaml and not self.colang:
            shown = files.source_name(path)
            raise PolicyError(f"{shown}: there are no .yml, .yaml or .co files of a rail config here.")

    @property
    def version(self) -> str:
        """The version of Colang."""
        found = (at(data, "colang_version") for data in self.yaml.values())
        return str(next(filter(None, found), "1.0"))

    def lists(self, *keys: str) -> Iterator[tuple[str, str, Any]]:
        """Each item of a list in any of the YAML files, with its file and key."""
        for file, data in self.yaml.items():
            found = at(data, *keys)
            for number, item in enumerate(found if isinstance(found, list) else ()):
                yield file, f"{'.'.join(keys)}[{number}]", item


def _walk(root: Path) -> Iterator[Path]:
    """The YAML and Colang files that NeMo loads from a folder: behind links, too, but not the knowledge base."""
    count = 0
    seen = set()  # links may lead in a circle
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in names:
            path = Path(folder, name)
            if path.suffix in (*_YAML, _COLANG) and not path.relative_to(root).as_posix().startswith("kb"):
                count += 1
                if count > MOST_FILES:
                    raise PolicyError(
                        f"{files.source_name(root)}: more than {MOST_FILES:,} files are in here; name the folder of "
                        "one rail config."
                    )
                yield path


def looks_like(path: Path) -> bool:
    """Whether a path is a config folder, a Colang file, or a YAML file with a config's keys."""
    if path.is_dir() or path.suffix == _COLANG:
        return True
    if path.suffix not in _YAML:
        return False
    data = read_yaml(files.read_text(path).removeprefix("\ufeff"), path.name)
    return isinstance(data, Mapping) and bool(
        {
            "models",
            "rails",
            "prompts",
            "instructions",
            "colang_version",
            "import_paths",
            "flows",
            "custom_data",
        }
        & set(data)
        or isinstance(data.get("policies"), list)
    )


def read(path: Path, name: str) -> tuple[list[Draft], list[Entry]]:
    """The policies of a config, and what in it is none.

    Raises:
        PolicyError: A file can't be read; the message names it.
    """
    folder = Folder(path)
    drafts: dict[str, Draft] = {}
    others: list[Entry] = []

    def draft(rail: str, variant: str = "", prefix: str = "C") -> Draft:
        key = f"{rail}-{variant}" if variant else rail
        if key not in drafts:
            drafts[key] = Draft(f"{name}-{key}", _KINDS.get(rail, _KINDS["input"]), prefix=prefix)
        return drafts[key]

    others += _prompts(folder, draft)
    others += _instructions(folder, draft)
    others += _lists(folder, draft)
    others += _validators(folder, draft)
    others += _eval_policies(folder, draft)
    others += _colang(folder, draft)
    others += _rest(folder, [*others, *(entry for one in drafts.values() for entry in one.entries())])
    return [one for one in drafts.values() if one.rules], [
        *others,
        *(Entry(piece) for one in drafts.values() if not one.rules for _, piece in one.exceptions),
    ]


Drafts = Callable[..., Draft]


def _rest(folder: Folder, known: Sequence[Entry]) -> list[Entry]:
    """The texts that nothing else was made of: settings, and what nobody knows."""
    taken = {(entry.piece.file, entry.piece.key) for entry in known}
    others = []
    for file, data in folder.yaml.items():
        for key, text in texts(data):
            above = key.rpartition(".")[0]
            if not text.strip() or not {(file, key), (file, above)}.isdisjoint(taken):
                continue
            first = re.split(r"[.\[]", key, maxsplit=1)[0]
            is_setting = (
                first in _SETTINGS or bool(_SETTING_OF.fullmatch(key)) or key.startswith("custom_data.rsafe.")
            )
            reason = "a setting" if is_setting else ""
            if flow := _RAIL.fullmatch(key):
                reason = _of_rail(flow["rail"], text)
            if first == "import_paths" and not _KNOWN_IMPORT.fullmatch(text.strip()):
                reason = ""  # what is there isn't read
            if first == "flows" and folder.version == "1.0":
                reason = "a step of a flow"
            others.append(Entry(Piece(str(text), file, text.line, key), reason=reason))
    return others


def _of_rail(rail: str, flow: str) -> str:
    """Why a flow that a rail names is no policy."""
    if _READ_RAILS.match(flow.strip()):
        return "a rail whose rules are read where they stand"
    return f"a flow of the {rail} rails whose checks no policy here covers; keep it"


def _prompts(folder: Folder, draft: Drafts) -> list[Entry]:
    others: list[Entry] = []
    seen: dict[str, int] = {}
    tasks = {str(at(item, "task") or "").split(" ")[0] for _, _, item in folder.lists("prompts")}
    self_checked = {rail for name, rail in _SELF_CHECK.items() if name in tasks}
    for file, key, item in folder.lists("prompts"):
        task = _TASK.match(str(at(item, "task") or ""))
        pieces = [
            piece
            for where, text in _contents(item, key)
            if isinstance(text, Text)
            for piece in _text_lines(text, file, where)
        ]
        if task is None:
            others += [Entry(piece, reason="a prompt without a task") for piece in pieces]
            continue
        name, value = task["name"], task["value"] or ""
        # The same task again is for other models: what it allows there, it doesn't allow elsewhere.
        count = seen[str(at(item, "task"))] = seen.get(str(at(item, "task")), 0) + 1
        again = str(count) if count > 1 else ""
        if name in _SELF_CHECK:
            variant = value if task["parameter"] == "variant" else ""
            others += plain.read(
                draft(_SELF_CHECK[name], "-".join(filter(None, (variant, again)))), pieces, judge=True
            )
        elif name in _CATEGORIES:
            variant = "" if value in ("content_safety", "llama_guard") else value
            if not variant and _CATEGORIES[name] in self_checked:
                variant = "categories"  # a rail of its own: what one allows, the other may forbid
            others += taxonomy.read(
                draft(_CATEGORIES[name], "-".join(filter(None, (variant, again)))), pieces
            )
        elif name == "topic_safety_check_input":
            others += _topics(draft("input", "topics", "T"), pieces)
        else:
            reason = _NOT_POLICY.get(name, f"the prompt of the task {name}, which states no policy")
            checks = name not in _NOT_POLICY and "check" in name.casefold()
            others += [
                Entry(piece, reason="" if checks and forbids_something(piece.text) else reason)
                for piece in pieces
            ]
    return others


def _contents(item: Any, key: str) -> list[tuple[str, Any]]:
    """A prompt's texts, with the key of each."""
    if at(item, "content"):
        return [(f"{key}.content", at(item, "content"))]
    messages = at(item, "messages")
    found = []
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        text = message if isinstance(message, Text) else at(message, "content")
        found.append((f"{key}.messages[{number}]", text))
    return found


def _text_lines(text: Text, file: str, key: str) -> list[Piece]:
    """A prompt's lines without its template's logic. Whatever branch they stand in, they may be said."""
    _check_template(text, file, key)
    plain_text = _CONTROL.sub(lambda found: "\n" * found[0].count("\n"), text)
    # A folded block of YAML has its bullets in one line.
    plain_text = _FOLDED.sub(lambda found: re.sub(r" - (?=\S)", "\n- ", found[0]), plain_text)
    pieces = lines(plain_text, file, key, text.line)
    return [replace(piece, line=min(piece.line, text.last)) for piece in pieces]


def _check_template(text: Text, file: str, key: str) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SandboxedEnvironment

    try:
        SandboxedEnvironment().parse(str(text))
    except TemplateSyntaxError as error:
        line = min(text.line + error.lineno - 1, text.last)
        raise PolicyError(f"{file}, line {line}: {key} is no Jinja template ({error.message}).") from None
    except RecursionError:
        raise PolicyError(
            f"{file}, line {text.line}: {key} is nested too deeply for a Jinja template."
        ) from None


def _topics(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """A description of what is on topic: all else is off, and what it forbids is forbidden."""
    others: list[Entry] = []
    said: list[Piece] = []
    for piece in unwrapped(pieces):
        if not _PLACE.sub("", piece.text).strip():
            others.append(Entry(piece, reason="where what is judged is put"))
            continue
        for sentence in sentences(piece.text):
            part = Piece(sentence, piece.file, piece.line, piece.key)
            if forbids_something(sentence, strictly=True):
                count = len(draft.rules)
                others += add_sentence(draft, part)
                for rule in draft.rules[count:]:
                    # It says what the bot may not do, and what is judged is the user's message.
                    rule.description = f"A message that breaks this rule or asks for what does: {sentence}"
            else:
                said.append(part)
    if said:
        whole = " ".join(one.text for one in said)
        description = f"What isn't covered by this: {whole}"
        draft.rules.insert(0, Rule("Off topic", said[0], description=description, more=list(said[1:])))
    return others


def _instructions(folder: Folder, draft: Drafts) -> list[Entry]:
    others: list[Entry] = []
    for file, key, item in folder.lists("instructions"):
        content = at(item, "content")
        pieces = _text_lines(content, file, f"{key}.content") if isinstance(content, Text) else []
        lead = ""  # forbids the bullets that follow
        for piece in unwrapped(pieces):
            is_bullet = bool(BULLET.match(piece.text))
            if is_bullet and lead:
                others += add_sentence(draft("output", "instructions", "G"), piece, says="forbids", lead=lead)
                continue
            begins = not is_bullet and piece.text.rstrip().endswith(":")
            lead = piece.text.strip() if begins and plain.polarity(piece.text) == "forbids" else ""
            if lead:
                others.append(Entry(piece, reason="a heading"))
                continue
            for sentence in sentences(BULLET.sub("", piece.text)):
                part = Piece(sentence, piece.file, piece.line, piece.key)
                if forbids_something(sentence):
                    others += add_sentence(draft("output", "instructions", "G"), part)
                else:
                    others.append(Entry(part, reason="an instruction to the main model"))
    for file, data in folder.yaml.items():
        if isinstance(sample := at(data, "sample_conversation"), Text):
            piece = Piece(sample.strip(), file, sample.line, "sample_conversation")
            others.append(Entry(piece, reason="a sample conversation for the main model"))
    return others


def _lists(folder: Folder, draft: Drafts) -> list[Entry]:
    """Lists under `rails.config`: names of data and labels are policy; patterns are for NeMo's own rails."""
    others: list[Entry] = []
    for file, data in folder.yaml.items():
        for key, text in texts(at(data, "rails", "config") or {}, "rails.config"):
            if key.startswith(_VALIDATORS):
                continue
            piece = Piece(str(text), file, text.line, key)
            name = key.rsplit(".", 1)[-1].partition("[")[0]
            rail = next((rail for rail in _JUDGED if f".{rail}." in key), "input")
            if name == "entities" and _only_masks(folder, rail):
                others.append(Entry(piece, reason="masked, and not forbidden; keep that rail"))
            elif name == "entities":
                one = draft(rail, "sensitive-data", "D")
                title = text.replace("_", " ").capitalize()
                meant = f"Personal data of the kind {title.lower()}."
                one.rules.append(Rule(title, piece, id=str(text), description=meant))
            elif name in ("blocked_labels", "blocked_classes", "labels"):
                for use in _rails_with(folder, key.split(".")[-2]) or [rail]:
                    draft(use, "classifier", "L").rules.append(Rule(str(text), piece))
            elif name in ("patterns", "injections") or "yara_rules" in key or "regex" in key:
                others.append(
                    Entry(piece, reason="a pattern, which NeMo's own rail matches exactly; keep that rail")
                )
            elif "refusal" in key or "message" in name:
                others.append(Entry(piece, reason="what the bot says; keep it"))
            else:
                is_policy = forbids_something(text) or bool(_FORBIDDEN_LIST.search(name))
                others.append(
                    Entry(piece, reason="" if is_policy else "a setting of one of NeMo's own rails")
                )
    return others


def _only_masks(folder: Folder, rail: str) -> bool:
    """Whether what a rail finds of personal data is masked, and nothing is blocked for it."""
    flows = [str(flow) for _, _, flow in folder.lists("rails", rail, "flows")]
    personal = [flow for flow in flows if re.search(r"\b(?:sensitive|pii|data)\b", flow, re.IGNORECASE)]
    return bool(personal) and all("mask" in flow.casefold() for flow in personal)


def _validators(folder: Folder, draft: Drafts) -> list[Entry]:
    """The validators of guardrails-ai, for the rails whose flows name them, or else for input."""
    others: list[Entry] = []
    for file, key, item in folder.lists(*_VALIDATORS.split(".")):
        name = at(item, "name")
        if not isinstance(name, Text):
            continue
        piece = Piece(str(name), file, name.line, f"{key}.name")
        words = list(_words(item, file, key))
        for rail in _rails_with(folder, name) or ["input"]:
            others += guardrails_ai.add_validator(draft(rail, "guardrails-ai", "V"), name, words, piece)
    return others


def _rails_with(folder: Folder, name: str) -> list[str]:
    """The rails whose flows name something."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    return [
        rail
        for rail in _JUDGED
        if any(word.search(str(flow)) for _, _, flow in folder.lists("rails", rail, "flows"))
    ]


def _words(item: Any, file: str, key: str) -> Iterator[tuple[str, list[tuple[str, Piece]]]]:
    """What the arguments of a validator list, by the argument's name."""
    for part in ("parameters", "metadata"):
        arguments = at(item, part)
        for name, value in arguments.items() if isinstance(arguments, Mapping) else ():
            if isinstance(value, list) or guardrails_ai.names_words(name):
                found = texts(value, f"{key}.{part}.{name}")
                yield name, [(str(text), Piece(str(text), file, text.line, where)) for where, text in found]


def _eval_policies(folder: Folder, draft: Drafts) -> list[Entry]:
    others: list[Entry] = []
    for file, key, item in folder.lists("policies"):
        identifier, description = at(item, "id"), at(item, "description")
        if not isinstance(identifier, Text):
            others += [Entry(Piece(str(text), file, text.line, where)) for where, text in texts(item, key)]
            continue
        piece = Piece(str(description or identifier), file, identifier.line, key)
        title = re.sub(r"[-_]+", " ", identifier).capitalize()
        # It says what the app shall do, such as "should not engage with toxic content".
        meant = f"What breaks this rule: {description}" if description else ""
        rule = Rule(title, piece, id=str(identifier), description=meant)
        draft("eval", prefix="E").rules.append(rule)
    if any(True for _ in folder.lists("policies")):
        # They are for conversations as a whole.
        draft("eval").kinds = ("prompt", "response")
    return others


def _colang(folder: Folder, draft: Drafts) -> list[Entry]:
    flows = colang.Flows()
    version = "1.0" if folder.version == "1.0" else "2.x"
    if not folder.yaml:
        defines = (re.search(r"^\s*define\b", text, re.MULTILINE) for text in folder.colang.values())
        version = "1.0" if any(defines) else "2.x"
    for file, text in folder.colang.items():
        colang.parse(text, file, version, flows)
    if version == "1.0":
        _yaml_flows(folder, flows)
    return colang.refusals(draft("dialog", prefix="R"), flows)


def _yaml_flows(folder: Folder, flows: colang.Flows) -> None:
    """What may stand in a config's YAML instead of in Colang 1.0."""
    for file, data in folder.yaml.items():
        for section, into in (("user_messages", flows.intents), ("bot_messages", flows.says)):
            found = at(data, section)
            for name, said in found.items() if isinstance(found, Mapping) else ():
                into.setdefault(name, []).extend(
                    Piece(text.strip(), file, text.line, key)
                    for key, text in texts(said, f"{section}.{name}")
                )
    for file, key, item in folder.lists("flows"):
        if isinstance(elements := at(item, "elements"), list):
            name = str(at(item, "id") or key)
            colang.parse_steps(_steps(elements, f"{key}.elements"), file, name, flows)


def _steps(elements: list[Any], key: str) -> list[Any]:
    """A flow's elements in the parser's form, which notes places under a key of its own."""
    found: list[Any] = []
    for number, element in enumerate(elements):
        where = f"{key}[{number}]"
        if isinstance(element, list):
            found.append(_steps(element, where))
        elif isinstance(element, Mapping):
            step = {
                name: _steps(value, f"{where}.{name}") if isinstance(value, list) else value
                for name, value in element.items()
            }
            place, text = next(texts(element, where), (where, None))
            mapping = (
                {"key": place, "line_number": text.line, "line_text": str(text)} if text is not None else {}
            )
            found.append({**step, "_source_mapping": mapping})
        else:
            found.append(element)
    return found
