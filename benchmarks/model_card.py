"""Measures the embedded guard on public sets and writes the figures into its model card.

Takes a folder with the sets as `rsafe eval` reads them, and goes on where an earlier run was stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import FOLDER, machine
from benchmarks.training import SMALL_POLICIES, evaluated, flips

CARD = Path(__file__).parents[1] / "docs" / "model-card.md"
REWORDED = ("--policy", str(Path(__file__).with_name("reworded.yaml")))
BEGIN, END = "<!-- figures: make eval -->", "<!-- end of figures -->"

# The file's name, what it is, and how many items are drawn from it: what two cores judge in an hour.
SETS = (
    ("openai_moderation", "OpenAI moderation (posts, stories)", 200),
    ("toxicchat", "ToxicChat (chat prompts)", 200),
    ("simplesafetytests", "SimpleSafetyTests", 100),
    ("harmbench_prompts", "HarmBench prompts", 100),
    ("harmbench_responses", "HarmBench responses", 100),
    ("beavertails_test", "BeaverTails (responses)", 100),
    ("coconot_contrast", "CoCoNot contrast (harmless, look harmful)", 150),
    ("notinject", "NotInject (harmless documents)", 150),
    ("deepset_injection_test", "deepset prompt-injections, test", 116),
)
COLUMNS = {
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "false_positive_rate": "False positives",
    "auroc": "AUROC",
    "auprc": "AUPRC",
}
ADHERENCE = 120  # items that are drawn to see whether it follows its policy
FOLLOWED = (
    "Policy",
    "Items",
    "Unsafe with them",
    "Safe without them",
    "Both: flip rate",
    "Harmless found unsafe",
)

SHIPPED = ("--backend", "embedded", "--verdicts", FOLDER.with_name("eval") / "verdicts.jsonl")


def figure(result: dict[str, Any], name: str) -> str:
    """A figure with its interval; empty where there is none, as the precision of a set that has nothing to find."""
    value, interval = result[name], result["intervals"][name]
    if value is None or (name == "precision" and not result["unsafe"]):
        return ""
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})" if interval else f"{value:.2f}"


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(folder: Path) -> list[str]:
    """A row for each set."""
    lines = [row(["Set", "Items (unsafe)", *COLUMNS.values(), "Failures"]), "|---" * (3 + len(COLUMNS)) + "|"]
    for name, title, limit in SETS:
        (result,) = evaluated(folder / f"{name}.jsonl", *SHIPPED, "--limit", str(limit))
        cells = [figure(result, column) for column in COLUMNS]
        lines.append(row([title, f"{result['items']} ({result['unsafe']})", *cells, result["failures"]]))
        print(lines[-1], flush=True)
    return lines


def adherence(folder: Path, policies: str, *options: str, items: int = ADHERENCE) -> str:
    """The row of those policies."""
    total = flips(folder, items, *SHIPPED, "--reasoning", "never", *options)
    counts = [total[name] for name in ("items", "unsafe_with", "safe_without")]
    harmless = f"{total['false_positives']} of {total['harmless']}"
    return row([policies, *counts, f"{total['flip_rate']:.2f}", harmless])


def figures(folder: Path) -> str:
    """The tables of the card."""
    lines = [
        *table(folder),
        "",
        "Does it follow its policy? Unsafe responses of BeaverTails, judged under a policy with their categories, and "
        "under the same one without them. A guard that ignores its policy gets a flip rate of 0. Harmless responses "
        "are judged under one of the policies with them.",
        "",
        row(FOLLOWED),
        "|---" * len(FOLLOWED) + "|",
        adherence(folder, "`rsafe-18`"),
        adherence(folder, "their categories of `rsafe-18` and three others", *SMALL_POLICIES),
        adherence(
            folder, "the same in words of somebody else", *SMALL_POLICIES, *REWORDED, items=ADHERENCE // 2
        ),
        "",
        f"{time.strftime('%Y-%m-%d')}, {machine()['cores']} core(s) ({machine()['cpu']}), version "
        f"{machine()['versions']['rsafe-plugins']}; 95% bootstrap intervals in parentheses.",
    ]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Expected the folder with the public sets as JSON Lines: make eval DATA=FOLDER")
    found = figures(Path(sys.argv[1]))
    before, _, rest = CARD.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    CARD.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}", "utf-8")
    print(f"Written into {CARD}.")


if __name__ == "__main__":
    main()
