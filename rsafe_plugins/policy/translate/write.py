"""The other way: policies in the form that other guards and NeMo Guardrails take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files
from rsafe_plugins.policy.model import (
    CONTENT_KINDS,
    MAX_CATEGORIES,
    MAX_ID_LENGTH,
    MAX_NAME_LENGTH,
    Category,
    ContentKind,
    Policy,
)

# The rails of NeMo by what they judge: their section, their flow, and their name in `custom_data.rsafe.policies`.
_RAILS: Mapping[ContentKind, tuple[str, str, str]] = {
    "prompt": ("input", "rsafe check input", "input"),
    "response": ("output", "rsafe check output", "output"),
    "document": ("retrieval", "rsafe check retrieval", "retrieval"),
    "tool_call": ("tool_output", "rsafe check tool call", "tool_call"),
    "tool_result": ("tool_input", "rsafe check tool result", "tool_result"),
}


def nemo_config(policies: Iterable[Policy], folder: Path) -> list[Path]:
    """Writes a rail config's folder: `config.yml` with a rail for all that the policies apply to, and their files.

    Args:
        policies: The policies. Several that judge the same kind become one, with all their categories.
        folder: Where it goes; it may exist, its `config.yml` must not.

    Returns:
        The files written.

    Raises:
        PolicyError: There is a config already, or a file can't be written.
    """
    config = folder / "config.yml"
    if config.exists():
        raise PolicyError(f"{files.source_name(config)}: there is a config already; choose another folder.")
    by_kind: dict[ContentKind, Policy] = {}
    for policy in policies:
        for kind in CONTENT_KINDS:
            if any(kind in category.applies_to for category in policy.categories):
                mine = policy.for_kind(kind)
                by_kind[kind] = together(by_kind[kind], mine) if kind in by_kind else mine
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolicyError(
            f"{files.source_name(folder)}: the folder can't be made ({error.strerror})."
        ) from None
    written: dict[str, Path] = {}
    named: dict[str, str] = {}
    rails: dict[str, dict[str, list[str]]] = {}
    for kind, policy in by_kind.items():
        section, flow, rail = _RAILS[kind]
        if policy.digest not in written:
            # NeMo would take YAML for config.
            path = written[policy.digest] = folder / f"policy-{rail.replace('_', '-')}.json"
            policy.save(path)
        rails[section] = {"flows": [flow]}
        named[rail] = written[policy.digest].name
    data = {
        "models": [{"type": "main", "engine": "openai", "model": "gpt-4o-mini"}],
        "import_paths": ["rsafe_plugins/rails"],
        "rails": rails,
        "custom_data": {"rsafe": {"policies": named}},
    }
    head = "# Set your main model. What each rail judges by stands in the policy files beside this.\n"
    files.write_text(config, head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    return [config, *written.values()]


def together(first: Policy, second: Policy) -> Policy:
    """The categories of two policies in one; ids and names that both have are told apart.

    Raises:
        PolicyError: They are more than a policy may have.
    """
    count = len(first.categories) + len(second.categories)
    if count > MAX_CATEGORIES:
        raise PolicyError(
            f"{first.name} and {second.name} judge the same content, and have {count} categories together; a "
            f"policy has at most {MAX_CATEGORIES}."
        )
    taken = {text.casefold() for one in first.categories for text in (one.id, one.name)}
    added = []
    for category in second.categories:
        update = {}
        for field in ("id", "name"):
            text = getattr(category, field)
            number, distinct = 2, text
            while distinct.casefold() in taken:
                end, most = (
                    (f"-{number}", MAX_ID_LENGTH) if field == "id" else (f" ({number})", MAX_NAME_LENGTH)
                )
                distinct, number = f"{text[: most - len(end)]}{end}", number + 1
            taken.add(distinct.casefold())
            update[field] = distinct
        added.append(category.model_copy(update=update))
    return first.model_copy(update={"categories": (*first.categories, *added)})


def safeguard_policy(policy: Policy) -> str:
    """The policy as a document for gpt-oss-safeguard: the system message, with the answer's form."""
    parts = [f"# {policy.name}"]
    if policy.description:
        parts.append(policy.description)
    parts.append(
        "## INSTRUCTION\nDecide whether the content violates this policy. Answer with 1 if it does, and with 0 if it "
        "doesn't, and nothing else."
    )
    violates = ["## VIOLATES (1)", *(f"- {_sentence(category)}" for category in policy.categories)]
    violates += [
        f"- {text}{_only_in(category)}" for category in policy.categories for text in category.covers
    ]
    parts.append("\n".join(violates))
    # What one category excuses is no excuse for what others forbid.
    beside = len(policy.categories) > 1
    allowed = dict.fromkeys(
        f"{text} (as to {category.name})" if beside else text
        for category in policy.categories
        for text in category.allows
    )
    parts.append("\n".join(["## DOES NOT VIOLATE (0)", *(f"- {text}" for text in allowed or ["All else."])]))
    examples = [
        f"- {_quoted(text)} -> {answer}"
        for category in policy.categories
        for answer, texts in ((1, category.examples), (0, category.allowed_examples))
        for text in texts
    ]
    if examples:
        parts.append("\n".join(["## EXAMPLES", *examples]))
    return "\n\n".join(parts) + "\n"


def llama_guard_prompt(policy: Policy) -> str:
    """The policy as Llama Guard's list of categories, with the conversation's place, for NeMo or by hand.

    Examples stand among the rules, marked as such.
    """
    blocks = []
    for number, category in enumerate(policy.categories, 1):
        lines = [f"S{number}: {category.name}."]
        if said := f"{category.description}{_only_in(category)}".strip():
            lines.append(said)
        for heading, rules, examples in (
            ("Should not", category.covers, category.examples),
            ("Can", category.allows, category.allowed_examples),
        ):
            bullets = [
                *(f"- {text}" for text in rules),
                *(f"- for example: {_quoted(text)}" for text in examples),
            ]
            lines += [heading, *bullets] if bullets else []
        blocks.append("\n".join(lines))
    # NeMo takes it for a Jinja template, in which only the conversation's place is to be filled in.
    listed = re.sub(r"\{(?=[{%#])", "{ ", "\n".join(blocks))
    return (
        "Task: Check if there is unsafe content in the conversation, by the categories below.\n\n"
        "<BEGIN UNSAFE CONTENT CATEGORIES>\n"
        + listed
        + "\n<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n"
        + _conversation(policy)
        + "\n<END CONVERSATION>\n\n"
        "Answer 'safe' or 'unsafe'. If unsafe, a second line lists the categories that are met, with commas.\n"
    )


def _conversation(policy: Policy) -> str:
    """What NeMo puts in: the user's message, and the answer where some of the policy is for answers."""
    kinds = {kind for category in policy.categories for kind in category.applies_to}
    answers = "response" in kinds and not kinds >= {*CONTENT_KINDS}
    return "User: {{ user_input }}\nAgent: {{ bot_response }}" if answers else "{{ user_input }}"


def _only_in(category: Category) -> str:
    """Says for which contents it is, where that isn't for all."""
    if {*category.applies_to} >= {*CONTENT_KINDS}:
        return ""
    return f" (only in: {', '.join(kind.replace('_', ' ') for kind in category.applies_to)})"


def _quoted(text: str) -> str:
    """Within quotes that it doesn't end itself."""
    return '"{}"'.format(text.replace('"', "'"))


def _sentence(category: Category) -> str:
    said = f"{category.name}: {category.description}" if category.description else category.name
    return said + _only_in(category)
