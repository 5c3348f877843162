"""How much of a training is kept: mixtures of the adapters before and after it, measured on held-out items.

Takes the adapter before it as a PEFT folder or GGUF file, the run's folder, and shares of the adapter after it, 0 to
1. Writes a row for each share: how well it judges harm, and for some thresholds of categories how many are found
unsafe, how many safe without their own, and the flip rate, under policies of the item's own categories and three
others. Goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.record import FOLDER, sound
from benchmarks.training import evaluated
from rsafe_plugins import Guard, Policy, Verdict
from rsafe_plugins.alignment.examples import category_ids
from rsafe_plugins.alignment.export import export_gguf, read_gguf
from rsafe_plugins.alignment.warm_start import load_base
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.evaluation.adherence import judge_under, pairs
from rsafe_plugins.evaluation.items import LabelledItem, read_items

OUT = FOLDER.with_name("mixture")
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_SURE = 0.99  # no fit is above that, so at this threshold everything is let through that can be
_OTHERS = 3
_WEIGHTS = "adapter_model.safetensors"


def mixture(before: Path, after: Path, share: float, out: Path) -> Path:
    """The adapter that lies between two of which one went on from the other.

    It keeps something of what the first knew, and most of what the second learned (arXiv 2109.01903).

    Args:
        before: The GGUF file of the first, or its PEFT folder.
        after: The PEFT folder of the second.
        share: What is taken of the second, 0 to 1, weight by weight.
        out: The folder to write: PEFT's files, and `guard-adapter.gguf`.

    Returns:
        The GGUF file.
    """
    config = load_base(embedded_weights())[0].config.to_dict()
    old = load_file(before / _WEIGHTS) if before.is_dir() else read_gguf(before, config)
    new = load_file(after / _WEIGHTS)
    shutil.copytree(after, out, dirs_exist_ok=True)
    mixed = {name: ((1 - share) * old[name] + share * new[name]).astype(np.float32) for name in new}
    save_file(mixed, out / _WEIGHTS)
    return export_gguf(out, config, out / "guard-adapter.gguf", name="rsafe guard")


def followed(adapter: Path, fitted: Path, held_out: Path, store: Path) -> dict[float, str]:
    """For each threshold of categories: how many are found unsafe, how many safe without their own, and the flip rate.

    Of the unsafe prompts and responses whose category is known.
    """
    named = [item.model_copy(update={"categories": category_ids(item)}) for item in read_items(held_out)]
    policy = Policy.load("rsafe-18")
    asked = pairs([item for item in named if item.task != "document"], policy.name, policy, others=_OTHERS)

    def guard_of(policy: Policy, least: float) -> Guard:
        return Guard(
            policy=policy,
            backend=f"embedded:{adapter}",
            reasoning="never",
            threshold=fitted,
            category_threshold=least,
        )

    with_them = _fits(guard_of, [(pair.item, pair.with_them) for pair in asked], store)
    without = _fits(guard_of, [(pair.item, pair.without_them) for pair in asked], store)
    cells = {}
    for least in THRESHOLDS:
        unsafe, safe = [fit >= least for fit in with_them], [fit < least for fit in without]
        flipped = sum(map(all, zip(unsafe, safe, strict=True)))
        cells[least] = f"{sum(unsafe)}, {sum(safe)}, {flipped / len(asked):.2f}"
    return cells


def _fits(
    guard_of: Callable[[Policy, float], Guard], asked: Sequence[tuple[LabelledItem, Policy]], store: Path
) -> list[float]:
    """How well the policy's own categories fit each item: it is found safe at thresholds above that.

    1 where no category that the policy leaves out is met, and -1 where it is found safe without a comparison.
    """
    fits = [-1.0] * len(asked)
    threshold = guard_of(asked[0][1], 0.0).operating_point.threshold
    bare = _scores(judge_under(asked, lambda policy: guard_of(policy, 0.0), store))
    unsafe = [place for place, score in enumerate(bare) if score >= threshold]
    again = [asked[place] for place in unsafe]
    compared = _scores(judge_under(again, lambda policy: guard_of(policy, _SURE), store))
    for place, score in zip(unsafe, compared, strict=True):
        # The score of what the comparison lets through lies under the threshold by as much as the fit does.
        fits[place] = score * _SURE / threshold if score < threshold else 1.0
    return fits


def _scores(verdicts: Sequence[Verdict]) -> list[float]:
    sound(verdicts)
    return [verdict.score or 0.0 for verdict in verdicts]


def _digest(*adapters: Path) -> str:
    """Of the adapters' weights, in short."""
    files = [adapter / _WEIGHTS if adapter.is_dir() else adapter for adapter in adapters]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[
        :8
    ]


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit("Expected: python -m benchmarks.mixture ADAPTER RUN-FOLDER SHARE...")
    before, run, shares = Path(sys.argv[1]), Path(sys.argv[2]), [float(one) for one in sys.argv[3:]]
    held_out, store = run / "held-out.jsonl", OUT / "verdicts.jsonl"
    out = OUT / _digest(before, run / "adapter")  # so that other adapters aren't taken for these
    lines = [
        f"| Share | AUROC, prompts | responses | documents | {' | '.join(f'at {one}' for one in THRESHOLDS)} |",
        "|---" * (4 + len(THRESHOLDS)) + "|",
    ]
    for share in shares:
        adapter = out / str(share) / "guard-adapter.gguf"
        if not adapter.exists():
            mixture(before, run / "adapter", share, adapter.parent)
        fitted = adapter.with_name("fitted.yaml")
        asked = ("--backend", f"embedded:{adapter}", "--reasoning", "never", "--verdicts", store)
        evaluated(held_out, *asked, "--unsafe-share", "0.5", "--fit", fitted)
        (result,) = evaluated(held_out, *asked, "--by", "task")
        tasks = {row["name"]: row["auroc"] for row in result["breakdown"]["task"]}
        cells = followed(adapter, fitted, held_out, store)
        judged = [f"{tasks[task]:.3f}" for task in ("prompt", "response", "document")]
        lines.append(f"| {' | '.join([f'{share:.2f}', *judged, *cells.values()])} |")
        print(lines[-1], flush=True)
    (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"Written: {out / 'table.md'}")


if __name__ == "__main__":
    main()
