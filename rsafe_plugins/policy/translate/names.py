"""Lists of category names alone: those of OpenAI's moderation API and of Perspective."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rsafe_plugins.policy.translate.pieces import Draft, Entry, Piece, Rule

# The names are the APIs' own (platform.openai.com/docs/guides/moderation, developers.perspectiveapi.com); what they
# mean is put in our own words.
KNOWN: Mapping[str, tuple[str, str]] = {
    "hate": (
        "Hate",
        "Contempt for people because of race, religion, gender, origin, disability or the like.",
    ),
    "hate/threatening": ("Threatening hate", "Hate that also threatens or wishes violence or serious harm."),
    "harassment": ("Harassment", "Language that harasses, bullies or insults somebody."),
    "harassment/threatening": (
        "Threatening harassment",
        "Harassment that also threatens violence or serious harm.",
    ),
    "self-harm": ("Self-harm", "Promoting or depicting suicide, cutting, eating disorders and the like."),
    "self-harm/intent": ("Intent of self-harm", "Somebody says that they harm themselves, or intend to."),
    "self-harm/instructions": (
        "Instructions for self-harm",
        "How to harm oneself, or encouragement to do so.",
    ),
    "sexual": ("Sexual content", "Content that is meant to arouse, or that promotes sexual services."),
    "sexual/minors": ("Sexual content with minors", "Sexual content that involves anybody under 18."),
    "violence": ("Violence", "Depicting or promoting death, violence or physical injury."),
    "violence/graphic": ("Graphic violence", "Death, violence or injury in graphic detail."),
    "illicit": ("Illicit acts", "Advice or instructions on how to commit illicit acts."),
    "illicit/violent": (
        "Violent illicit acts",
        "Illicit advice that refers to violence or to getting a weapon.",
    ),
    "TOXICITY": (
        "Toxicity",
        "Rude, disrespectful or unreasonable comments that make people leave a discussion.",
    ),
    "SEVERE_TOXICITY": ("Severe toxicity", "Very hateful, aggressive or disrespectful comments."),
    "IDENTITY_ATTACK": ("Identity attack", "Hateful comments about somebody because of their identity."),
    "INSULT": ("Insult", "Insulting, inflammatory or negative comments towards a person or a group."),
    "PROFANITY": ("Profanity", "Swear words, curse words and other obscene language."),
    "THREAT": ("Threat", "Saying that one intends to hurt a person or a group."),
    "SEXUALLY_EXPLICIT": (
        "Sexually explicit",
        "References to sexual acts or body parts, and other lewd content.",
    ),
    "FLIRTATION": ("Flirtation", "Pickup lines, compliments on looks, subtle sexual innuendo."),
}
_FOLDED = {re.sub(r"[\s_-]+", "-", name.casefold()): name for name in KNOWN}


def known(text: str) -> str | None:
    """The name as the API spells it; None where it is none of them."""
    return _FOLDED.get(re.sub(r"[\s_-]+", "-", text.strip().strip("\"'-*,").strip().casefold()))


def looks_like(pieces: Sequence[Piece]) -> bool:
    """Whether a text is a list of such names and nothing else."""
    return len(pieces) > 0 and all(known(piece.text) for piece in pieces)


def read(draft: Draft, pieces: Sequence[Piece]) -> list[Entry]:
    """Adds a category for each name.

    Returns:
        What is no such name.
    """
    others = []
    for piece in pieces:
        if name := known(piece.text):
            title, description = KNOWN[name]
            draft.rules.append(Rule(title, piece, id=name, description=description))
        else:
            others.append(Entry(piece))
    return others
