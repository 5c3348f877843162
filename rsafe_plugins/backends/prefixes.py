"""What llama.cpp computed for the static beginnings of prompts, kept on disk from one process to the next.

A policy makes most of a guard's prompt, and computing it is most of a cold start. Only what `Message.static`
marks is kept, so no content that was judged reaches the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import secrets
import time
from pathlib import Path

from cachetools import LRUCache

from rsafe_plugins.backends.llama_server import LlamaServer
from rsafe_plugins.backends.tokens import Tokens, common_length
from rsafe_plugins.errors import BackendError

MOST_KEPT = 4
_SHORTEST = 128  # tokens; fewer are computed faster than looked for
_REMEMBERED = 64  # beginnings known to be in memory or on disk
_ABANDONED = 600.0  # seconds
_ALIKE = 0.8  # of a beginning that is served by another one, the cache's own sharing is enough


class SavedPrefixes:
    """The beginnings of prompts that were computed for one model.

    Nothing here fails: what can't be read is computed, and what can't be written is computed again next time.

    Args:
        folder: Where they are kept, for this user alone; the server must have been started with it.
        model: The model's file name, and how it is run.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            for left in folder.glob("*.part"):
                # Of a process that was killed; a living one needs some milliseconds.
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink(missing_ok=True)
        self._model = f"{model}, xllamacpp {importlib.metadata.version('xllamacpp')}"
        self._warm: LRUCache[str, Tokens] = LRUCache(_REMEMBERED)
        self._is_fresh = True

    def knows(self, text: str) -> bool:
        """Whether `warm` was called for this beginning."""
        return text in self._warm

    async def warm(self, server: LlamaServer, text: str, tokens: Tokens) -> None:
        """Has the server hold the state after these tokens: read where it was saved, else computed and saved.

        Args:
            server: A server for that model, which must get no other request meanwhile: what it holds is saved.
            text: A beginning that many prompts share.
            tokens: Its tokens.
        """
        is_alike = any(common_length(tokens, other) >= _ALIKE * len(tokens) for other in self._warm.values())
        is_first, self._is_fresh = self._is_fresh, False
        self._warm[text] = tokens
        if is_alike or len(tokens) < _SHORTEST:
            return
        digest = hashlib.sha256(f"{self._model} {tokens}".encode()).hexdigest()[:24]
        path = self._folder / f"{digest}.prefix"
        with contextlib.suppress(BackendError, OSError):
            # A later one would take the slot of the first, which llama.cpp keeps only if it does that itself.
            if path.is_file() and (not is_first or await _restored(server, path, len(tokens))):
                return
            await self._save(server, tokens, path)

    async def _save(self, server: LlamaServer, tokens: Tokens, path: Path) -> None:
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")
        try:
            await server.ask("/completion", {"prompt": tokens, "n_predict": 0, "id_slot": 0})
            answer = await server.ask("/slots/0?action=save", {"filename": part.name})
            if answer.get("n_saved") == len(tokens):
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        saved = sorted(self._folder.glob("*.prefix"), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in saved[MOST_KEPT:]:
            old.unlink(missing_ok=True)


async def _restored(server: LlamaServer, path: Path, tokens: int) -> bool:
    try:
        answer = await server.ask("/slots/0?action=restore", {"filename": path.name})
    except BackendError:
        return False
    if answer.get("n_restored") != tokens:
        return False
    os.utime(path)
    return True
