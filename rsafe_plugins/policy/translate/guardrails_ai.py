"""Specs of guardrails-ai (RAIL files): those validators that state a safety policy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.parsers import expat

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule

# What the hub's validators check, in our own words; their arguments narrow it.
_SAFETY: Mapping[str, tuple[str, str]] = {
    "toxic-language": ("Toxic language", "Language that is toxic: abusive, hateful, threatening or obscene."),
    "profanity-free": ("Profanity", "Swear words, curse words and other obscene language."),
    "nsfw-text": ("Not safe for work", "Sexual, graphic or otherwise not fit for a workplace."),
    "detect-pii": ("Personal data", "Data that identifies a person."),
    "guardrails-pii": ("Personal data", "Data that identifies a person."),
    "is-profanity-free": ("Profanity", "Swear words, curse words and other obscene language."),
    "detect-prompt-injection": ("Jailbreak", "Attempts to get a model to ignore its rules."),
    "prompt-injection-detector": ("Jailbreak", "Attempts to get a model to ignore its rules."),
    "pii": ("Personal data", "Data that identifies a person."),
    "detect-secrets": ("Secrets", "Passwords, keys and other secrets."),
    "detect-jailbreak": ("Jailbreak", "Attempts to get a model to ignore its rules."),
    "unusual-prompt": ("Unusual prompt", "Attempts to trick a model by an unusual way of asking."),
    "restricttotopic": ("Off topic", "What is about none of the topics that are allowed."),
    "restrict-to-topic": ("Off topic", "What is about none of the topics that are allowed."),
    "competitor-check": ("Competitors", "Naming competitors."),
    "ban-list": ("Banned words", "Words that are banned."),
    "secrets-present": ("Secrets", "Passwords, keys and other secrets."),
    "gibberish-text": ("Gibberish", "Text without meaning."),
    "bias-check": ("Bias", "Prejudice against people because of age, gender, race, religion or the like."),
    "sensitive-topic": ("Sensitive topics", "Topics that are sensitive."),
    "sensitive-topics": ("Sensitive topics", "Topics that are sensitive."),
    "mentions-drugs": ("Drugs", "Mentioning drugs."),
    "has-url": ("Links", "Links to websites."),
    "llamaguard-7b": (
        "Unsafe content",
        "What Llama Guard forbids: violence, crime, weapons, drugs, self-harm.",
    ),
    "shieldgemma-2b": ("Unsafe content", "Dangerous content, harassment, hate speech and sexual content."),
}
# Validators of the hub that check form or quality.
_NO_POLICY = """
    bug-free-python bug-free-sql contains-string correct-language csv-match csv-validator cucumber-expression-match
    ends-with endpoint-is-reachable exclude-sql-predicates extracted-summary-sentences-match extractive-summary
    financial-tone grounded-ai-hallucination high-quality-translation is-high-quality-translation is-reachable length
    llm-critic logic-check lowercase lower-case one-line provenance-embeddings provenance-llm provenance-v0
    provenance-v1 qa-relevance-llm-eval quotes-price reading-time redundant-sentences regex-match
    remove-redundant-sentences response-evaluator responsiveness-check saliency-check similar-to-document
    similar-to-list similar-to-previous-values sql-column-presence starts-with two-words uppercase upper-case
    valid-address valid-choices valid-json valid-length valid-open-api-spec valid-python valid-range valid-sql
    valid-url wiki-provenance
"""
_NAMESPACES = re.compile(r"^(?:hub://)?(?:[\w.-]+/)*(?P<name>[\w.-]+)$")
_LISTS = re.compile(r"\"([^\"]+)\"|'([^']+)'")
_NAMED = re.compile(r"\b(\w+) ?=\s*(\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[^,\s]+)")
_WORDS = re.compile(r"topic|word|entit|competitor|list|term|ban", re.IGNORECASE)
_NUMBERS = re.compile(r"(?:[\d.]|true|false|none|sentence|full|\s)+", re.IGNORECASE)
_VALIDATOR = re.compile(r"(?P<name>(?:hub://)?[\w./-]+)\s*(?::\s*(?P<arguments>\{[^}]*\}|\[[^\]]*\]|[^;]*))?")


def looks_like(text: str) -> bool:
    """Whether a text is such a spec."""
    return bool(re.search(r"<rail\b", text, re.IGNORECASE))


def read(draft: Draft, text: str, file: str) -> list[Entry]:
    """Adds a category for each validator that states a safety policy.

    Returns:
        The other validators, and the texts of the spec.

    Raises:
        PolicyError: It is no XML.
    """
    others: list[Entry] = []
    parser = expat.ParserCreate()
    path: list[str] = []

    def entities(*_: object) -> None:
        raise PolicyError(f"{file}: a spec with entities of its own is not read.")

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        path.append(tag)
        for name in ("validators", "format"):
            if validators := attributes.get(name):
                key = f"{'/'.join(path)}[@{name}]"
                for found in _VALIDATOR.finditer(validators):
                    piece = Piece(found[0].strip(), file, parser.CurrentLineNumber, key)
                    words = [
                        (name, [(value, piece) for value in values])
                        for name, values in _arguments(found["arguments"] or "")
                    ]
                    others.extend(add_validator(draft, found["name"], words, piece))

    def data(content: str) -> None:
        if content.strip():
            piece = Piece(content.strip(), file, parser.CurrentLineNumber, "/".join(path))
            others.append(Entry(piece, reason="a prompt or an instruction to the main model"))

    parser.EntityDeclHandler = entities
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: path.pop()
    parser.CharacterDataHandler = data
    parser.buffer_text = True
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise PolicyError(
            f"{file}, line {error.lineno}: this is no XML ({expat.ErrorString(error.code)})."
        ) from None
    return others


Words = Sequence[tuple[str, Sequence[tuple[str, Piece]]]]


def add_validator(draft: Draft, name: str, words: Words, piece: Piece) -> list[Entry]:
    """Adds a category for a validator if it states a safety policy.

    Args:
        draft: Where it goes.
        name: The validator's name on guardrails-ai's hub.
        words: Its arguments that are lists of words, such as topics: the name of each, and the words with their place.
        piece: Where it stands.

    Returns:
        Why it is none, if it is none.
    """
    plain = _NAMESPACES.match(name)
    asked = (plain["name"] if plain else name).casefold().replace("_", "-")
    known = _SAFETY.get(asked)
    if known is None:
        is_form = asked in _NO_POLICY.split()
        return [Entry(piece, reason="a validator that checks form or quality, not safety" if is_form else "")]
    title, description = known
    rule = Rule(title, piece, description=description)
    for key, values in words:
        allows = title == "Off topic" and "invalid" not in key
        (rule.allows if allows else rule.covers).extend(values)
    draft.rules.append(rule)
    return []


def names_words(argument: str) -> bool:
    """Whether an argument of a validator is about words, such as its topics, and is no setting."""
    return bool(_WORDS.search(argument))


def _arguments(text: str) -> list[tuple[str, list[str]]]:
    """A validator's lists of words, with the name of each."""
    inner = " ".join(text.split()).removeprefix("{").removesuffix("}")
    named = _NAMED.findall(inner)
    found = []
    for key, value in named or [("", inner)]:
        if named and not value.startswith("[") and not names_words(key):
            continue  # a setting, such as a threshold or a device
        words = [one or other for one, other in _LISTS.findall(value)]
        if not words:
            plain = (word.strip() for word in value.strip("[] ").split(","))
            words = [word for word in plain if word and not _NUMBERS.fullmatch(word)]
        found.append((key.casefold(), words))
    return found
