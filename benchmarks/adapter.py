"""Trains the adapter that ships with the package again, from the folder with its data; goes on where it was stopped.

All runs end after as many items as they did then, when the clock ended them and their learning rates fell with time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.mixture import mixture
from benchmarks.record import FOLDER
from benchmarks.training import align, evaluated, training_files
from rsafe_plugins.evaluation.items import read_items


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Expected the folder with the training data as JSON Lines: make adapter DATA=FOLDER")
    folder, out = Path(sys.argv[1]), FOLDER.with_name("adapter")
    files = training_files(folder, hatecheck=700, gptfuzz=900)
    first = align("warm-start", files, out / "first", "--set", "items=5264")
    changes = ("--set", "items=5248", "--learning-rate", "4e-4", "--adapter", str(first))
    second = align("warm-start", training_files(folder), out / "second", *changes)
    files = training_files(folder, ailuminate=1160, jailbreakbench=1310)
    changes = ("--set", "items=5242", "--set", "dtype=bfloat16", "--adapter", str(second))
    third = align("warm-start", files, out / "third", *changes, recipe="embedded-categories")
    mixture(second, third, 0.5, out / "mean")
    files = training_files(folder, ailuminate=1160, jailbreakbench=1310, hatecheck=700)
    changes = ("--set", "items=5786", "--set", "dtype=bfloat16", "--adapter", str(out / "mean"))
    more = ("--set", "by_category=0.5", "--set", "prompts_as_documents=500", "--set", "max_prompt_tokens=128")
    fourth = align("warm-start", files, out / "fourth", *changes, *more, recipe="embedded-categories")
    mixture(out / "mean", fourth, 0.5, out / "second-mean")
    files = training_files(
        folder, wildguard=1500, surge=400, ailuminate=1160, jailbreakbench=1310, hatecheck=300, gptfuzz=500
    )
    changes = ("--set", "items=4992", "--set", "dtype=bfloat16", "--adapter", str(out / "second-mean"))
    more = ("--set", "by_category=0.3", "--set", "max_prompt_tokens=128")
    more += ("--set", "prompts_as_documents=1500", "--set", "injected_documents=1000")
    more += ("--set", "distill.prompts=0.5", "--set", "distill.responses=1")
    fifth = align("warm-start", files, out / "fifth", *changes, *more, recipe="embedded-categories")
    adapter = mixture(out / "second-mean", fifth, 0.5, out / "shipped")
    fitted = out / "fitted.yaml"
    bare = ("--backend", f"embedded:{adapter}", "--reasoning", "never", "--category-threshold", "0.4")
    held_out = fifth.parent / "held-out.jsonl"
    evaluated(held_out, *bare, "--unsafe-share", "0.5", "--fit", fitted)
    # Most of what is retrieved is harmless.
    documents = out / "documents.jsonl"
    rows = [item.model_dump_json() for item in read_items(held_out) if item.task == "document"]
    documents.write_text("\n".join(rows) + "\n", "utf-8")
    evaluated(documents, *bare, "--unsafe-share", "0.3", "--fit", fitted)
    print(f"The adapter: {adapter}; its thresholds: {fitted}")


if __name__ == "__main__":
    main()
