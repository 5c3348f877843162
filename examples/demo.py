"""The guard at work in NeMo Guardrails, LangChain, LlamaIndex and on the command line: `make demo`.

The inputs stand in data/demo_inputs.jsonl. The guard is the embedded one; only the main model that it guards
is a stand-in, since what it would answer doesn't matter here.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rsafe_plugins import Content, Guard, Verdict

os.environ.setdefault("NEMO_GUARDRAILS_NO_USAGE_STATS", "1")

HERE = Path(__file__).parent
RSAFE = Path(sys.executable).with_name("rsafe")

# Without reasoning a verdict takes some tenths of a second; `rsafe check --reasoning always` shows a thought.
SETTINGS = {"backend": "embedded", "reasoning": "never"}

console = Console(markup=False, highlight=False)


@dataclass(frozen=True)
class Input:
    """One line of data/demo_inputs.jsonl: which way it comes in, and what a person would say of it."""

    via: str
    kind: str
    expect: str
    text: str
    prompt: str = ""
    query: str = ""


@dataclass(frozen=True)
class Result:
    """What became of an input: the guard's verdict, and what the framework did."""

    input: Input
    verdict: Verdict
    outcome: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        return self.verdict.label == self.input.expect


class WatchedGuard(Guard):
    """A guard that keeps its verdicts for the table. An application needs none of this: `Guard()` will do."""

    def __init__(self, **settings: str) -> None:
        super().__init__(**settings)
        self.verdicts: list[Verdict] = []

    def check_many(self, contents: Iterable[Content | str]) -> list[Verdict]:
        return self._kept(super().check_many(contents))

    async def acheck_many(self, contents: Iterable[Content | str]) -> list[Verdict]:
        return self._kept(await super().acheck_many(contents))

    def _kept(self, verdicts: list[Verdict]) -> list[Verdict]:
        self.verdicts += verdicts
        return verdicts


def nemo_guardrails(inputs: Sequence[Input]) -> list[Result]:
    from nemoguardrails import LLMRails, RailsConfig
    from nemoguardrails.rails.llm.options import RailStatus, RailType
    from nemoguardrails.testing import FakeLLMModel

    guard = WatchedGuard(**SETTINGS)
    config = RailsConfig.from_path(str(HERE.parent / "rails" / "configs" / "chat-moderation"))
    config.models.clear()  # in place of the config's main model there is the stand-in below
    config.custom_data["rsafe"] = guard
    rails = LLMRails(config, llm=FakeLLMModel(responses=[]))

    async def check(item: Input) -> Result:
        if item.kind == "prompt":
            messages, rail = [{"role": "user", "content": item.text}], RailType.INPUT
        else:
            messages, rail = [{"role": "user", "content": item.prompt}], RailType.OUTPUT
            messages.append({"role": "assistant", "content": item.text})
        started = time.perf_counter()
        result = await rails.check_async(messages, rail_types=[rail])
        seconds = time.perf_counter() - started
        passed = result.status == RailStatus.PASSED
        return Result(item, guard.verdicts[-1], "passed on" if passed else f"refused: {result.rail}", seconds)

    async def check_all() -> list[Result]:
        return [await check(item) for item in inputs]

    return asyncio.run(check_all())


def langchain(inputs: Sequence[Input]) -> list[Result]:
    from langchain_core.runnables import RunnableLambda

    from rsafe_plugins.langchain import RSafeGuard

    guard = WatchedGuard(**SETTINGS)
    chain = RSafeGuard(guard) | RunnableLambda(lambda prompt: f"The main model's answer to {prompt!r}.")
    started = time.perf_counter()
    outputs = chain.batch([item.text for item in inputs], return_exceptions=True)
    seconds = (time.perf_counter() - started) / len(inputs)
    return [
        Result(item, verdict, type(output).__name__ if isinstance(output, Exception) else "answered", seconds)
        for item, verdict, output in zip(inputs, guard.verdicts, outputs, strict=True)
    ]


def llama_index(inputs: Sequence[Input]) -> list[Result]:
    from llama_index.core import SummaryIndex
    from llama_index.core.llms import MockLLM
    from llama_index.core.schema import TextNode

    from rsafe_plugins.llama_index import RSafeNodePostprocessor

    guard = WatchedGuard(policy="prompt-injection", **SETTINGS)
    index = SummaryIndex([TextNode(text=item.text) for item in inputs])
    engine = index.as_query_engine(llm=MockLLM(), node_postprocessors=[RSafeNodePostprocessor(guard)])
    started = time.perf_counter()
    kept = {node.text for node in engine.query(inputs[0].query).source_nodes}
    seconds = (time.perf_counter() - started) / len(inputs)
    return [
        Result(item, verdict, "kept" if item.text in kept else "dropped", seconds)
        for item, verdict in zip(inputs, guard.verdicts, strict=True)
    ]


def command_line(inputs: Sequence[Input]) -> list[Result]:
    texts = [item.text for item in inputs]
    command = [RSAFE, "check", "--json", "--reasoning", "never", "--backend", "embedded", *texts]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = (time.perf_counter() - started) / len(inputs)
    verdicts = [Verdict.model_validate_json(line) for line in done.stdout.splitlines()]
    return [
        Result(item, verdict, "blocked" if verdict.blocked else "passed", seconds)
        for item, verdict in zip(inputs, verdicts, strict=True)
    ]


WAYS = {
    "nemo": ("NeMo Guardrails: input and output rails, one message at a time", nemo_guardrails),
    "langchain": ("LangChain: a chain with RSafeGuard, one batch", langchain),
    "llama_index": ("LlamaIndex: the nodes of one query, policy prompt-injection", llama_index),
    "cli": ("rsafe check, a process of its own", command_line),
}


def read_inputs() -> list[Input]:
    lines = (HERE / "data" / "demo_inputs.jsonl").read_text("utf-8").splitlines()
    return [Input(**json.loads(line)) for line in lines]


def show(title: str, results: Sequence[Result]) -> None:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, expand=True, pad_edge=False
    )
    for name, options in {
        "what came in": {"ratio": 1, "no_wrap": True, "overflow": "ellipsis"},
        "verdict": {"no_wrap": True},
        "unsafe": {"justify": "right"},
        "categories": {"no_wrap": True},
        "outcome": {"no_wrap": True},
        "time": {"justify": "right", "no_wrap": True},
    }.items():
        table.add_column(name, **options)
    for result in results:
        verdict = result.verdict
        label = verdict.label or "error"
        style = {"safe": "green", "unsafe": "red", "error": "yellow"}[label]
        table.add_row(
            Text(result.input.text),
            Text(label if result.as_expected else f"{label} *", style=style),
            "" if verdict.score is None else f"{verdict.score:.0%}",
            ", ".join(verdict.categories),
            result.outcome,
            f"{result.seconds:.2f} s",
        )
    console.print(table)
    for error in sorted({result.verdict.error for result in results if result.verdict.error}):
        console.print(Text(f"The guard failed: {error}", style="yellow"))
    console.print()


def sum_up(results: Sequence[Result], seconds: float) -> None:
    for expect, did, verb in (("unsafe", True, "blocked"), ("safe", False, "let through")):
        asked = [result for result in results if result.input.expect == expect]
        right = sum(result.verdict.blocked is did for result in asked)
        console.print(f"{right} of {len(asked)} {expect} inputs were {verb}.")
    if not all(result.as_expected for result in results):
        console.print("* marks where the guard says something else than a person would.")
    console.print(f"{len(results)} inputs in {seconds:.0f} s, frameworks and engine loaded included.\n")
    rsafe = os.path.relpath(RSAFE)
    console.print("What to type next:", style="bold")
    console.print(f'  {rsafe} check "any text"                       a verdict on a text of yours')
    console.print(f'  {rsafe} check --reasoning always "any text"    with the thought that led to it')
    console.print(f"  {rsafe} policies rsafe-18                      what the policy forbids")
    console.print(f"  {rsafe} doctor                                 what works on this machine")
    console.print("README.md says how to put it into your own rails, chain or query engine.")


def main() -> int:
    started = time.perf_counter()
    inputs = read_inputs()
    results: list[Result] = []
    for via, (title, run) in WAYS.items():
        shown = run([item for item in inputs if item.via == via])
        show(title, shown)
        results += shown
    sum_up(results, time.perf_counter() - started)
    return 3 if any(result.verdict.label is None for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
