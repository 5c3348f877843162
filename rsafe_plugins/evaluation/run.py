"""Runs a guard over labelled items, and takes up again where an earlier run was stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard import Guard, Verdict


def sample(items: Sequence[LabelledItem], limit: int | None, seed: int = 0) -> list[LabelledItem]:
    """At most `limit` items, drawn by the seed alone, in the file's order."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in chosen]


def judge(
    items: Sequence[LabelledItem],
    guard_for: Callable[[LabelledItem], Guard],
    store: Path | None = None,
    batch: int = 16,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Verdict]:
    """A verdict for each item, in order.

    Args:
        items: What is judged.
        guard_for: The guard for an item; documents are judged under another policy than prompts.
        store: A JSON Lines file that every verdict is appended to as soon as it is there. Items that it holds
            already, judged with the same settings, are not judged again.
        batch: Items a call of the guard.
        on_progress: Called with the number of items that are done.

    Raises:
        DataError: The store holds something else than verdicts.
    """
    keys = [_key(item, guard_for(item)) for item in items]
    known = _stored(store)
    waiting = [(key, item) for key, item in zip(keys, items, strict=True) if key not in known]
    on_progress(len(items) - len(waiting))
    done = len(items) - len(waiting)
    while waiting:
        guard = guard_for(waiting[0][1])
        part = [pair for pair in waiting[:batch] if guard_for(pair[1]) is guard]
        verdicts = guard.check_many(item.content() for _, item in part)
        fresh = {key: verdict for (key, _), verdict in zip(part, verdicts, strict=True)}
        _append(store, fresh)
        known.update(fresh)
        waiting = [pair for pair in waiting if pair[0] not in fresh]
        done += len(part)
        on_progress(done)
    return [known[key] for key in keys]


def _key(item: LabelledItem, guard: Guard) -> str:
    settings = guard.settings
    how = f"{guard.policy.digest[:12]}/{guard.backend.model}/{settings.reasoning}/{settings.threshold}/{settings.band}"
    return f"{item.id}/{how}/{settings.max_reasoning_tokens}"


def _stored(store: Path | None) -> dict[str, Verdict]:
    if store is None or not store.exists():
        return {}
    lines = store.read_text("utf-8").splitlines()
    known: dict[str, Verdict] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known[row["key"]] = Verdict.model_validate(row["verdict"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                # The run was stopped while it wrote its last line; that item is judged again.
                store.write_text("".join(f"{line}\n" for line in lines[:-1]), "utf-8")
                break
            raise DataError(
                f"{store}, line {number}: expected a stored verdict ({type(error).__name__})."
            ) from error
    return known


def _append(store: Path | None, fresh: Mapping[str, Verdict]) -> None:
    if store is None:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a", encoding="utf-8") as file:
        for key, verdict in fresh.items():
            # A failed check is judged again by the next run.
            if verdict.label is not None:
                file.write(json.dumps({"key": key, "verdict": verdict.model_dump(mode="json")}) + "\n")
