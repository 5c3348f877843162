"""Runs a guard over labelled items, and takes up again where an earlier run was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rsafe_plugins.backends import model_and_adapter
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard import Guard, Verdict

_BEGINNING = b'{"key": "'  # of each line in a store


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
        store: A JSON Lines file that every verdict is appended to after each batch. Items that it holds
            already, judged with the same settings, are not judged again.
        batch: Items a call of the guard.
        on_progress: Called with the number of items that are done.

    Raises:
        DataError: The store holds something else than verdicts.
    """
    guards = [guard_for(item) for item in items]
    distinct = {id(guard): guard for guard in guards}
    engines = {identity: engine_identity(guard) for identity, guard in distinct.items()}
    keys = [_key(item, guard, engines[id(guard)]) for item, guard in zip(items, guards, strict=True)]
    known = _stored(store)
    waiting = [row for row in zip(keys, items, guards, strict=True) if row[0] not in known]
    while waiting:
        on_progress(len(items) - len(waiting))
        guard = waiting[0][2]
        part = [row for row in waiting[:batch] if row[2] is guard]
        verdicts = guard.check_many(item.content() for _, item, _ in part)
        fresh = {key: verdict for (key, _, _), verdict in zip(part, verdicts, strict=True)}
        judged = zip(part, verdicts, strict=True)
        _append(
            store, {key: verdict for (key, item, _), verdict in judged if _is_whole(verdict, item, guard)}
        )
        known.update(fresh)
        waiting = [row for row in waiting if row[0] not in fresh]
    on_progress(len(items))
    return [known[key] for key in keys]


def engine_identity(guard: Guard) -> str:
    """The model's name, with what tells it from others of that name, where the settings say so.

    That is its weights' files, or the addresses of its servers. A backend object counts by its model's name alone.
    """
    backend = guard.settings.backend
    where = backend.partition(":")[2] if isinstance(backend, str) else ""
    path = Path(model_and_adapter(where)[0])  # an adapter's weights are in the model's name
    seen: object = where
    if where and path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    elif "://" not in where:
        return guard.backend.model
    digest = hashlib.blake2b(repr(seen).encode("utf-8"), digest_size=4).hexdigest()
    return f"{guard.backend.model}-{digest}"


def _key(item: LabelledItem, guard: Guard, engine: str) -> str:
    """What the guard is asked, and how; two items with the same text share a verdict."""
    settings, point = guard.settings, guard.operating_point
    content, dialect = item.content(), guard.dialect
    chat = (dialect.name, dialect.digest, guard.policy.digest, dialect.messages(guard.policy, content))
    asked = hashlib.blake2b(repr(chat).encode("utf-8"), digest_size=12).hexdigest()
    how = f"{engine}/{settings.reasoning}/{point.threshold}/{point.band}"
    if others := guard.compared_with(content.kind):
        second = (guard.by_category.dialect.messages(guard.policy, content), others)
        asked = hashlib.blake2b(repr((chat, second)).encode("utf-8"), digest_size=12).hexdigest()
        how += f"/{point.category_threshold}"
    named = "/unnamed"
    if settings.name_categories:
        named = "/asked" if guard.names_by_category(content.kind) else ""
    return f"{asked}/{how}/{settings.max_reasoning_tokens}{named}"


def _stored(store: Path | None) -> dict[str, Verdict]:
    if store is None or not store.exists():
        return {}
    written = store.read_bytes()
    whole, newline, rest = written.rpartition(b"\n")
    lines = whole.split(b"\n") if newline else []
    # A run that was stopped while it wrote left a part of a line; that item is judged again.
    is_cut_off = bool(rest) and not _is_json(rest)
    if is_cut_off and not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
        raise DataError(
            f"{store} doesn't end as a file of stored verdicts does: name another one for --verdicts."
        )
    if rest and not is_cut_off:
        lines.append(rest)
    known: dict[str, Verdict] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known[row["key"]] = Verdict.model_validate(row["verdict"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{store}, line {number}: expected a stored verdict ({type(error).__name__})."
            ) from error
    if is_cut_off:
        os.truncate(store, len(written) - len(rest))
    elif rest:
        with store.open("ab") as file:
            file.write(b"\n")
    return known


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_whole(verdict: Verdict, item: LabelledItem, guard: Guard) -> bool:
    """Whether nothing failed; otherwise the next run judges it again."""
    if verdict.label is None:
        return False
    # What stays unsafe when it is asked about category by category names one, or the question failed.
    asked = guard.compared_with(item.content().kind) and verdict.reasoning is None
    return not asked or verdict.label == "safe" or bool(verdict.categories)


def _append(store: Path | None, fresh: Mapping[str, Verdict]) -> None:
    if store is None:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a", encoding="utf-8") as file:
        for key, verdict in fresh.items():
            file.write(json.dumps({"key": key, "verdict": verdict.model_dump(mode="json")}) + "\n")
