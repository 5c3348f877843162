"""YAML as plain data whose texts know their lines; nothing in it is ever constructed or run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files

_MOST_NODES = 100_000
_DEEPEST = 64


class Text(str):
    """A scalar, as text whatever its type.

    Attributes:
        line: The line where its text begins, from 1.
        last: The line where it ends, which is fewer lines on than it has itself where YAML folds or escapes them.
    """

    __slots__ = ("last", "line")

    line: int
    last: int

    def __new__(cls, value: str, line: int, last: int) -> Text:
        """A text that stands on lines."""
        made = super().__new__(cls, value)
        made.line, made.last = line, last
        return made


def read_yaml(text: str, source: str) -> Any:
    """The data of a YAML document: dicts, lists and `Text`.

    Raises:
        PolicyError: It is no YAML, a key stands twice in a mapping, or it is too large or too deep; the message
            names source and line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PolicyError(f"{source}, line {line}: this is no YAML ({error.problem}).") from None
    except yaml.YAMLError as error:
        raise PolicyError(f"{source}: this is no YAML ({type(error).__name__}).") from None
    except RecursionError:
        raise PolicyError(f"{source}: this YAML is nested too deeply.") from None
    left = [_MOST_NODES]
    return {} if node is None else _built(node, source, left, 0)


def _built(node: yaml.Node, source: str, left: list[int], depth: int) -> Any:
    left[0] -= 1
    # An alias stands for a copy of its anchor, and a few lines of them for more than any memory holds.
    if left[0] < 0 or depth > _DEEPEST:
        raise PolicyError(
            f"{source}: this YAML has more than {_MOST_NODES:,} values, or is nested too deeply."
        )
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        firsts: dict[str, int] = {}
        own = {str(name.value) for name, _ in node.value if isinstance(name, yaml.ScalarNode)}
        for key, value in node.value:
            built = _built(value, source, left, depth + 1)
            if not isinstance(key, yaml.ScalarNode):
                raise PolicyError(f"{source}, line {key.start_mark.line + 1}: this key is no text.")
            if key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in firsts:  # a loader would take the last, and lose the others in silence
                    raise PolicyError(
                        f"{source}, line {line}: the key {files.shown(key.value)} stands on line {firsts[key.value]} "
                        "already; remove one, or make one of them."
                    )
                firsts[key.value] = line
                found[str(key.value)] = built
                continue
            for merged in built if isinstance(built, list) else [built]:
                if isinstance(merged, Mapping):
                    found.update(
                        {name: one for name, one in merged.items() if name not in own and name not in found}
                    )
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_built(value, source, left, depth + 1) for value in node.value]
    begins_below = getattr(node, "style", None) in ("|", ">")
    first = node.start_mark.line + (2 if begins_below else 1)
    return Text(str(node.value), first, max(first, node.end_mark.line + (0 if begins_below else 1)))


def texts(data: Any, key: str = "") -> Iterator[tuple[str, Text]]:
    """All texts in data, with the key of each."""
    if isinstance(data, Text):
        yield key, data
    elif isinstance(data, Mapping):
        for name, value in data.items():
            yield from texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from texts(value, f"{key}[{number}]")


def at(data: Any, *keys: str) -> Any:
    """What stands under keys, one below the other; None where nothing does."""
    for key in keys:
        if not isinstance(data, Mapping) or key not in data:
            return None
        data = data[key]
    return data
