"""From the policies that teams have to a guard's policies, with a report of every piece of text.

Each format is one module: what it looks like, and how it is read. Nothing of a source is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files
from rsafe_plugins.policy.model import CONTENT_KINDS, ContentKind, Policy
from rsafe_plugins.policy.translate import guardrails_ai, names, nemo, plain, safeguard, taxonomy
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece
from rsafe_plugins.policy.translate.prose import lines

Format = Literal["rsafe", "nemo", "taxonomy", "gpt-oss-safeguard", "names", "guardrails-ai", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)

__all__ = ["FORMATS", "Entry", "Format", "NoPolicyError", "Piece", "Translation", "translate"]


class NoPolicyError(PolicyError):
    """There is no policy in a source.

    Attributes:
        report: Every piece of text that was found, and why it is no policy.
    """

    def __init__(self, message: str, report: list[Entry]) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Translation:
    """What a source says.

    Attributes:
        format: How it was read.
        policies: Its policies: one for each rail and variant where they differ, by name.
        report: Every piece of text that was found, where it went, or why it is no policy.
    """

    format: Format
    policies: dict[str, Policy]
    report: list[Entry]

    @property
    def unplaced(self) -> list[Entry]:
        """The pieces of which nobody knows what became of them."""
        return [entry for entry in self.report if not entry.is_placed]

    def policy_for(self, kind: ContentKind) -> Policy:
        """The one policy that judges a kind of content.

        Raises:
            PolicyError: There is none, or there are several.
        """
        found = [
            policy
            for policy in self.policies.values()
            if any(kind in category.applies_to for category in policy.categories)
        ]
        if len(found) != 1:
            have = ", ".join(policy.name for policy in found) or "none"
            raise PolicyError(f"Expected one policy for a {kind}, and there is {have}.")
        return found[0].for_kind(kind)


def translate(source: str | os.PathLike[str], *, format: Format | None = None) -> Translation:
    """Reads the policies of a file or a folder.

    Args:
        source: A rail config's folder, or a file.
        format: How to read it; None recognizes it from its content.

    Raises:
        NoPolicyError: There is no policy in it.
        PolicyError: It can't be read; the message names file and line.
    """
    path = Path(source)
    shown = files.source_name(path)
    if not path.exists():
        raise PolicyError(f"{shown}: there is no such file or folder; check the path.")
    name = path.resolve().stem or "policy"
    if format is None:
        format = _recognized(path)
    if format == "rsafe":
        policy = Policy.load(path)
        return Translation(format, {policy.name: policy}, [])
    drafts, others = nemo.read(path, name) if format == "nemo" else _read_text(path, name, format)
    drafts = _merged([draft for draft in drafts if draft.rules])
    if not drafts:
        raise NoPolicyError(
            f"{shown}: there is no policy in it: read as {format}, it has {len(others)} pieces of text, and none of "
            "them forbids anything.",
            sorted(others, key=_place),
        )
    policies = {draft.name: draft.policy() for draft in drafts}
    entries = [entry for draft in drafts for entry in draft.entries()]
    return Translation(format, policies, sorted([*entries, *others], key=_place))


def _recognized(path: Path) -> Format:
    if path.is_dir():
        return "nemo"
    text = files.read_text(path).removeprefix("\ufeff")
    if path.suffix in (".yaml", ".yml", ".json") and _is_own(path, text):
        return "rsafe"
    if nemo.looks_like(path):
        return "nemo"
    if guardrails_ai.looks_like(text):
        return "guardrails-ai"
    if names.looks_like(lines(text, path.name, "", 1)):
        return "names"
    if not taxonomy.begins(text) and safeguard.looks_like(text):
        return "gpt-oss-safeguard"
    if taxonomy.looks_like(text):
        return "taxonomy"
    return "text"


def _is_own(path: Path, text: str) -> bool:
    if "categories" not in text:
        return False
    try:
        Policy.load(path)
    except PolicyError:
        # A mistake in one of ours is said as such.
        return not nemo.looks_like(path)
    return True


def _read_text(path: Path, name: str, format: Format) -> tuple[list[Draft], list[Entry]]:
    text = files.read_text(path).removeprefix("\ufeff")
    draft = Draft(name, CONTENT_KINDS)
    pieces = lines(text, path.name, "", 1)
    if format == "guardrails-ai":
        return [draft], guardrails_ai.read(draft, text, path.name)
    readers: dict[str, Callable[..., list[Entry]]] = {
        "taxonomy": taxonomy.read,
        "gpt-oss-safeguard": safeguard.read,
        "names": names.read,
        "text": plain.read,
    }
    return [draft], readers[format](draft, pieces)


def _merged(drafts: list[Draft]) -> list[Draft]:
    """The same with drafts that say the same made one, which is for all that they were for."""
    found: dict[str, Draft] = {}
    for draft in drafts:
        policy = draft.policy()
        categories = [one.model_copy(update={"applies_to": CONTENT_KINDS}) for one in policy.categories]
        whole = policy.model_copy(update={"categories": categories})
        first = found.setdefault(whole.digest, draft)
        if first is draft:
            continue
        if len(first.rules) != len(draft.rules):  # they differ in what is too much for a policy
            found[f"{whole.digest} {draft.name}"] = draft
            continue
        first.kinds = tuple(kind for kind in CONTENT_KINDS if kind in (*first.kinds, *draft.kinds))
        for rule, other in zip(first.rules, draft.rules, strict=True):
            rule.more += other.pieces
        first.exceptions += draft.exceptions
    return list(found.values())


def _place(entry: Entry) -> tuple[str, int, str]:
    return entry.piece.file, entry.piece.line, entry.piece.key
