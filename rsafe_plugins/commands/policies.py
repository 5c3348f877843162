"""`rsafe policies`: the built-in policies, and what a policy forbids."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rsafe_plugins import Policy
from rsafe_plugins.commands import common
from rsafe_plugins.policy import CONTENT_KINDS


@click.command()
@click.argument("name", metavar="[NAME|PATH]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
def policies(name: str | None, as_json: bool) -> None:
    """Lists the built-in policies, or shows the categories of one.

    A PATH is a policy file of your own: it is read and checked, and an unusable one gives exit status 2.
    """
    if name is not None:
        policy = Policy.load(name)
        if as_json:
            common.print_json(_described(policy, name) | policy.model_dump(mode="json"))
        else:
            _print_policy(policy)
        return
    builtin = {name: Policy.load(name) for name in Policy.builtin_names()}
    if as_json:
        for name, policy in builtin.items():
            common.print_json(_described(policy, name))
    else:
        _print_list(builtin)


def _described(policy: Policy, name: str) -> dict[str, Any]:
    return {
        "load": name,
        "name": policy.name,
        "description": policy.description,
        "digest": policy.digest,
        "categories": [category.id for category in policy.categories],
    }


def _print_list(builtin: dict[str, Policy]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy", no_wrap=True)
    table.add_column("categories", no_wrap=True, justify="right")
    table.add_column("for")
    for name, policy in builtin.items():
        table.add_row(name, str(len(policy.categories)), policy.description)
    console = common.console()
    console.print(table)
    console.print(
        Text("rsafe policies NAME shows one; a policy file of yours goes by its path.", style="dim")
    )


def _print_policy(policy: Policy) -> None:
    console = common.console()
    console.print(Text(common.printable(policy.name), style="bold"))
    if policy.description:
        console.print(Text(common.printable(policy.description)))
    for category in policy.categories:
        console.print(Text(common.printable(f"\n{category.id}  {category.name}"), style="bold"))
        _print_indented(console, category.description)
        for title, items in (
            ("covers", category.covers),
            ("allows", category.allows),
            ("unsafe examples", category.examples),
            ("safe examples", category.allowed_examples),
        ):
            if items:
                _print_indented(console, f"{title}: {'; '.join(items)}")
        if len(category.applies_to) < len(CONTENT_KINDS):
            _print_indented(console, f"applies to: {', '.join(category.applies_to)}")


def _print_indented(console: Console, text: str) -> None:
    if text:
        console.print(Padding(Text(common.printable(text)), (0, 0, 0, 2)))
