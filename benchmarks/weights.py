"""The embedded guard's merged weights as a folder for transformers and vLLM, which read no such GGUF."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import FOLDER
from rsafe_plugins import Content, Guard, Verdict
from rsafe_plugins.alignment.export import export_folder
from rsafe_plugins.backends.merge import merged_weights
from rsafe_plugins.backends.weights import PACKAGED_ADAPTER, cache_folder, embedded_weights


def guard_folder() -> Path:
    """Made at the first call, then kept."""
    path = FOLDER / "guard"
    if not (path / "config.json").exists():
        export_folder(merged_weights(embedded_weights(), PACKAGED_ADAPTER, cache_folder()), path)
    return path


def percent_cached(verdicts: Sequence[Verdict], tokenizer: Any, guard: Guard, content: Content) -> float:
    """How much of the policy the prefix cache served, on average over checks of one request each."""
    static = static_tokens(tokenizer, guard, content)
    return 100 * statistics.mean(min(1.0, verdict.usage.cached_tokens / static) for verdict in verdicts)


def static_tokens(tokenizer: Any, guard: Guard, content: Content) -> int:
    """Tokens of the prompt's part that is the same for every content of this kind."""
    (message,) = guard.dialect.messages(guard.policy, content)
    chat = [{"role": message.role, "content": message.content[: message.static]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    end = text.index(chat[0]["content"].strip()) + len(chat[0]["content"].rstrip())
    return len(tokenizer.encode(text[:end], add_special_tokens=False))
