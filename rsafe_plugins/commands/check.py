"""`rsafe check`: verdicts on texts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
from rich.padding import Padding
from rich.text import Text

from rsafe_plugins import Content, Policy, Verdict
from rsafe_plugins.commands import common
from rsafe_plugins.policy import CONTENT_KINDS, ContentKind

SAFE, BLOCKED, FAILED = 0, 1, 3


@click.command()
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@click.option(
    "--kind",
    type=click.Choice(CONTENT_KINDS),
    default="prompt",
    show_default=True,
    help="What the text is. A tool call is written as JSON: "
    """{"name": "send_mail", "arguments": {"to": "..."}}.""",
)
@click.option(
    "--prompt",
    "context",
    metavar="TEXT",
    help="The prompt that a response answers, or the query that a document was found for.",
)
@click.option("--lines", is_flag=True, help="With -, take each line of standard input as a text of its own.")
@click.option(
    "--policy", metavar="NAME|PATH", help="A built-in policy or a policy file; see `rsafe policies`."
)
@click.option("--backend", metavar="ENGINE", help="For example embedded, llamacpp:PATH, openai:URL#MODEL.")
@click.option(
    "--dialect",
    metavar="NAME|PATH",
    help="How the guard model is asked and answers. Default: guessed from the model's name.",
)
@click.option(
    "--reasoning",
    type=click.Choice(["never", "always", "adaptive"]),
    help="Whether the guard thinks before its verdict; adaptive: only when it is unsure.",
)
@click.option(
    "--threshold",
    type=common.Threshold(),
    metavar="P|FILE",
    help="Block from this probability on; or a file that `rsafe eval --fit` wrote.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="For each check.")
@click.option(
    "--on-error", type=click.Choice(["block", "allow", "raise"]), help="What to do if the guard fails."
)
@click.option("--template", metavar="PATH", type=click.Path(), help="The wording of the guard's prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a text, and nothing else.")
def check(
    texts: tuple[str, ...],
    kind: ContentKind,
    context: str | None,
    lines: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Judges each TEXT; - stands for standard input. Several are judged as one batch.

    Exit status: 0 nothing was blocked, 1 something was, 2 wrong usage, 3 the guard failed.
    """
    items = _read(texts, lines)
    contents = [_content(text, kind, context) for text in items]
    guard = common.make_guard(**settings)
    started = time.monotonic()
    verdicts = guard.check_many(contents)
    seconds = time.monotonic() - started
    if as_json:
        for verdict in verdicts:
            common.print_json(verdict.model_dump(mode="json"))
    else:
        _print_verdicts(items, verdicts, guard.policy, seconds)
    if any(verdict.label is None for verdict in verdicts):
        return FAILED
    return BLOCKED if any(verdict.blocked for verdict in verdicts) else SAFE


def _read(texts: Sequence[str], lines: bool) -> list[str]:
    if lines and "-" not in texts:
        raise click.UsageError("--lines is about standard input: give - as the text.")
    if texts.count("-") > 1:
        raise click.UsageError("Standard input can be read once: give - only once.")
    items: list[str] = []
    for number, text in enumerate(texts, start=1):
        if text == "-":
            items.extend(_standard_input(lines))
        elif not text.strip():
            raise click.UsageError(f"Expected a text to check; text {number} is empty.")
        else:
            items.append(_checked_utf8(text, number))
    return items


def _standard_input(lines: bool) -> list[str]:
    if sys.stdin is None:  # where a script has closed it
        raise click.UsageError("Standard input is closed: give the text as an argument, or open it.")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"Expected UTF-8 on standard input; byte {error.start} is not: convert it first, as iconv does."
        ) from None
    except OSError as error:
        raise click.UsageError(f"Standard input can't be read: {error.strerror or error}.") from None
    if not text.strip():
        raise click.UsageError("Expected a text to check on standard input; it is empty.")
    items = text.removesuffix("\n").split("\n") if lines else [text.rstrip("\r\n")]
    for number, item in enumerate(items, start=1):
        if not item.strip():
            raise click.UsageError(f"Expected a text in each line of standard input; line {number} is empty.")
    return [item.removesuffix("\r") for item in items]


def _checked_utf8(text: str, number: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise click.UsageError(f"Expected UTF-8; text {number} is in another encoding.") from None
    return text


def _content(text: str, kind: ContentKind, context: str | None) -> Content:
    if context is not None and kind not in ("response", "document"):
        raise click.UsageError(f"--prompt goes with --kind response or document, not {kind}.")
    match kind:
        case "prompt":
            return Content.prompt(text)
        case "response":
            return Content.response(text, prompt=context or "")
        case "document":
            return Content.document(text, query=context or "")
        case "tool_call":
            return _tool_call(text)
        case "tool_result":
            return Content.tool_result(text)


def _tool_call(text: str) -> Content:
    try:
        call = json.loads(text, object_pairs_hook=_each_once)
        name = call.pop("name")
        arguments = call.pop("arguments" if "arguments" in call else "args", {})
        form = [call.pop("id", None), call.pop("type", None)]
        # Whatever else it says would go unjudged.
        if call or not isinstance(name, str) or not isinstance(arguments, dict | str):
            raise TypeError
        if not all(value is None or isinstance(value, str) for value in form):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise click.UsageError(
            'Expected a tool call as JSON, {"name": "...", "arguments": {...}}; the text is something else.'
        ) from None
    return Content.tool_call(name, arguments)


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that it has twice one value would go unjudged."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _print_verdicts(
    items: Sequence[str], verdicts: Sequence[Verdict], policy: Policy, seconds: float
) -> None:
    console = common.console()
    for item, verdict in zip(items, verdicts, strict=True):
        console.print(_headline(verdict, policy))
        if len(items) > 1:
            console.print(Padding(Text(common.excerpt(item, 200)), (0, 0, 0, 2)))
        if verdict.reasoning:
            console.print(Padding(Text(common.printable(verdict.reasoning), style="italic"), (0, 0, 0, 2)))
    last = verdicts[-1]
    blocked = sum(verdict.blocked for verdict in verdicts)
    count = f"{len(verdicts)} checked, {blocked} blocked · " if len(verdicts) > 1 else ""
    origin = common.printable(f"policy {last.policy} · model {last.model}")
    console.print(Text(f"{count}{origin} · {seconds:.2f} s", style="dim"))


def _headline(verdict: Verdict, policy: Policy) -> Text:
    if verdict.label is None:
        outcome = "blocked" if verdict.blocked else "let through"
        error = common.printable(" ".join((verdict.error or "the guard failed").split()))
        return Text.assemble(("ERROR", "bold yellow"), f"  {outcome}: {error}")
    style = "bold red" if verdict.label == "unsafe" else "bold green"
    parts = [] if verdict.score is None else [f"{verdict.score:.0%} unsafe"]
    parts += [_named(category, policy) for category in verdict.categories]
    parts += [f"{category} (not in the policy)" for category in verdict.unknown_categories]
    return Text.assemble((verdict.label.upper(), style), common.printable("  " + " · ".join(parts)))


def _named(category_id: str, policy: Policy) -> str:
    category = policy.find(category_id)
    return category_id if category is None else f"{category_id} {category.name}"
