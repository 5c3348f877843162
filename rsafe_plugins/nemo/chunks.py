"""Retrieved chunks within the text that the main model gets of them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsafe_plugins.guard.texts import text_of

_MARKS = string.punctuation + string.whitespace


@dataclass(frozen=True, slots=True)
class Chunks:
    """Pieces of a text: what is judged, and what separates it.

    Attributes:
        pieces: The text, cut up; put together they are the text.
        places: Which of the pieces are judged.
        beside: Chunks that are not in the text.
    """

    pieces: tuple[str, ...]
    places: tuple[int, ...]
    beside: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: object, separate: object) -> Chunks:
        """The chunks in a text.

        Args:
            text: The whole text.
            separate: The chunks in it, in order. What of the text is in none of them counts as one more.
        """
        whole = text_of(text or "").text
        pieces: list[str] = []
        beside: list[str] = []
        end = 0
        for chunk in separate if isinstance(separate, list | tuple) else ():
            known = text_of(chunk).text
            start = whole.find(known, end) if known else -1
            if start < 0:
                beside.append(known)
                continue
            between = whole[end:start]
            if pieces and "\n" not in between:
                # What stands on one line is read as one, however a client cuts it up.
                pieces[-1] += between + known
            else:
                pieces += [between, known]
            end = start + len(known)
        pieces.append(whole[end:])
        # What separates chunks needs no judgement while it says nothing.
        places = tuple(
            number for number, piece in enumerate(pieces) if piece.strip(None if number % 2 else _MARKS)
        )
        return cls(tuple(pieces), places, tuple(filter(str.strip, beside)))

    @property
    def judged(self) -> list[str]:
        """The texts to be judged."""
        return [*(self.pieces[place] for place in self.places), *self.beside]

    def without(self, numbers: set[int]) -> Chunks:
        """The same without some of those judged, and without the separators that followed them."""
        gone = {place for number, place in enumerate(self.places) if number in numbers}
        kept: list[str] = []
        places: list[int] = []
        for number, piece in enumerate(self.pieces):
            is_judged = number in self.places
            if number in gone or (number - 1 in gone and not is_judged):
                continue
            if is_judged:
                places.append(len(kept))
            kept.append(piece)
        beside = (text for number, text in enumerate(self.beside, len(self.places)) if number not in numbers)
        return Chunks(tuple(kept), tuple(places), tuple(beside))

    def variables(self) -> Mapping[str, Any]:
        """NeMo's variables for them."""
        return {"relevant_chunks": "".join(self.pieces), "relevant_chunks_sep": self.judged}
