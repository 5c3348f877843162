"""How likely a model is to write a text, from the likeliest tokens that a server tells as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rsafe_plugins.errors import BackendError

Following = Mapping[bytes, float]
"""The likeliest tokens at one place, with their log-probabilities."""

_NEGLIGIBLE = math.log(0.02)


class SpelledWalk:
    """Follows candidates along all the ways in which tokens spell them.

    Args:
        candidates: The texts, of at least one character each.
        known: What is known already: the likeliest tokens after a beginning, by that beginning.
        exact: Whether to follow every way that may matter. Otherwise a way that leaves what is known ends there,
            and its candidate is one of those in `bounded`.

    Attributes:
        bounded: Candidates whose log-probability may be no more than an upper bound.

    Raises:
        BackendError: A candidate is empty.
    """

    def __init__(self, candidates: Sequence[str], known: Mapping[bytes, Following], *, exact: bool) -> None:
        if not all(candidates):
            raise BackendError("A candidate must not be empty, and one is.")
        self.bounded: set[str] = set()
        self._texts = {name: name.encode() for name in candidates}
        self._found: dict[str, list[float]] = {name: [] for name in candidates}
        self._known = known
        self._exact = exact
        self._open = {b"": 0.0}

    def next_unread(self) -> bytes | None:
        """The beginning after which the likeliest tokens must be asked for; None once there is no more."""
        while self._open:
            path = next(reversed(self._open))
            if not (following := self._known.get(path)):
                return path
            self.read(path, following)
        return None

    def read(self, path: bytes, following: Following) -> None:
        """Goes on from a beginning by the likeliest tokens after it.

        Raises:
            BackendError: None of them is on the way to a candidate, at the very beginning.
        """
        so_far = self._open.pop(path)
        tails = {name: text[len(path) :] for name, text in self._texts.items() if text.startswith(path)}
        ways = {
            name: [(piece, logprob) for piece, logprob in following.items() if _spells(piece, tail)]
            for name, tail in tails.items()
        }
        best = max((logprob for way in ways.values() for _, logprob in way), default=-math.inf)
        if best == -math.inf and not path:
            raise BackendError(
                f"None of the candidates {list(self._texts)} is among the {len(following)} likeliest "
                "continuations: this model doesn't answer in the form that is asked for."
            )
        followed: dict[bytes, float] = {}
        for name, tail in tails.items():
            if not ways[name]:
                self._found[name].append(so_far + _bound(following))
            for piece, logprob in ways[name]:
                longer = path + piece
                is_whole = len(piece) >= len(tail)
                matters = not is_whole and logprob - best >= _NEGLIGIBLE and _is_text(longer)
                if matters and (self._exact or longer in self._known):
                    followed[longer] = so_far + logprob
                    continue
                self._found[name].append(so_far + logprob)
                if matters:
                    self.bounded.add(name)
        for longer, logprob in followed.items():
            self._open[longer] = log_sum([logprob, self._open.get(longer, -math.inf)])

    def logprobs(self) -> dict[str, float]:
        """The log-probability of each candidate, together no more than everything."""
        logprobs = {name: log_sum(ways) for name, ways in self._found.items()}
        # Upper bounds may add up to more than everything.
        excess = max(0.0, log_sum(list(logprobs.values())))
        return {name: logprob - excess for name, logprob in logprobs.items()}


def log_sum(logprobs: Sequence[float]) -> float:
    """The logarithm of the sum of probabilities that are given as logarithms."""
    highest = max(logprobs)
    return highest + math.log(math.fsum(math.exp(logprob - highest) for logprob in logprobs))


def _spells(piece: bytes, tail: bytes) -> bool:
    """Whether a token is on the way to a text: its beginning, all of it, or all of it and the end of the word."""
    if not piece:
        return False  # a control token
    if len(piece) <= len(tail):
        return tail.startswith(piece)
    return piece.startswith(tail) and not piece[len(tail) :].decode(errors="replace")[0].isalnum()


def _bound(following: Following) -> float:
    """The most that a token which isn't among the likeliest can have."""
    left = 1.0 - math.fsum(map(math.exp, following.values()))
    # Engines compute in single precision: what is left over is known to about a millionth.
    return min(min(following.values()), math.log(max(left, 1e-6)))


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
