"""Streams that are handed on only as far as they are judged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

from rsafe_plugins.errors import SettingsError

Chunk = TypeVar("Chunk")


class _End:
    """What stands behind the last chunk of a stream."""


END: Final = _End()


class Windows(Generic[Chunk]):
    """The chunks of a stream: those handed on, and those that wait for a verdict on all that was said so far.

    Args:
        window: Characters that may wait; None lets all wait for the end of the stream.
        length: The characters of a chunk.
        join: What several chunks, at least one, say together, as one chunk.

    Raises:
        SettingsError: The window isn't at least one character.
    """

    def __init__(
        self,
        window: int | None,
        length: Callable[[Chunk], int],
        join: Callable[[Sequence[Chunk]], Chunk],
    ) -> None:
        check_window(window)
        self._window = window
        self._length = length
        self._join = join
        self._said: list[Chunk] = []  # all of them; those that were put together once stay one
        self._waiting: list[Chunk] = []
        self._characters = 0  # of those that wait

    @property
    def has_more(self) -> bool:
        """Whether a chunk waits."""
        return bool(self._waiting)

    def add(self, chunk: Chunk | _End) -> bool:
        """Takes a chunk, or the end; says whether those that wait must be judged now."""
        if isinstance(chunk, _End):
            return self.has_more
        self._said.append(chunk)
        self._waiting.append(chunk)
        self._characters += self._length(chunk)
        return self._window is not None and self._characters >= self._window

    def together(self) -> Chunk:
        """All that was said so far, what waits included, which is at least one chunk."""
        self._said = [self._join(self._said)]
        return self._said[0]

    def release(self) -> list[Chunk]:
        """The chunks that waited, since all that was said so far was found safe."""
        released, self._waiting, self._characters = self._waiting, [], 0
        return released


def check_window(window: int | None) -> None:
    """Refuses a window that is no number of characters.

    Raises:
        SettingsError: It isn't a whole number from 1 on.
    """
    if window is not None and (type(window) is not int or window < 1):
        raise SettingsError(f"stream_window must be at least 1 character, not {window!r}.")


def and_end(chunks: Iterator[Chunk]) -> Iterator[Chunk | _End]:
    """The chunks of a stream, then `END`."""
    yield from chunks
    yield END


async def aand_end(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk | _End]:
    """The same of an asynchronous stream."""
    async for chunk in chunks:
        yield chunk
    yield END
