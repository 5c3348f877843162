"""The guard beside other ways to ask the same model on the same server: lists, and one check after the other.

The server is vLLM with the embedded guard's weights; its Python is the only argument. Each peer is given the guard's
own prompt and at most 16 tokens for its answer. Only the time is compared: without a begun answer, which none of them
can give it, this small guard often answers with something that is no verdict.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ["OPENAI_API_KEY"] = "none"  # before the frameworks look for one

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from llama_index.llms.openai_like import OpenAILike
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.rails.llm.options import RailType

from benchmarks.record import FOLDER, Part, fifty, sound
from benchmarks.weights import guard_folder
from rsafe_plugins import Content, Guard
from rsafe_plugins.guard.prompt import GuardPrompt
from rsafe_plugins.langchain import RSafeGuard

RUNS = int(os.environ.get("RUNS", "3"))
ONE_BY_ONE = 6
ANSWER = 16
PLACE = "the-text-under-judgement"

Way = Callable[[Sequence[str]], Awaitable[object]]


@contextmanager
def server(python: str) -> Iterator[str]:
    """vLLM's OpenAI-compatible server, for as long as it is needed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(guard_folder())]
    command += ["--served-model-name", "guard", "--port", str(port), "--max-model-len", "4096"]
    command += [
        "--dtype",
        "bfloat16",
        "--block-size",
        "32",
        "--enforce-eager",
        "--enable-prompt-tokens-details",
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    log = FOLDER / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"vLLM's server ended before it was ready; see {log}.")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    sys.exit(f"vLLM's server wasn't ready after ten minutes; see {log}.")


def prompt_around() -> tuple[str, str]:
    """The guard's prompt for a bare verdict, before and after what is judged."""
    (message,) = GuardPrompt().messages(Guard(backend="embedded").policy, Content.prompt(PLACE), "skip")
    before, after = message.content.split(PLACE)
    return before, after


def ways(url: str) -> dict[str, Way]:
    """Each way to judge a list of prompts, by name."""
    before, after = prompt_around()
    guard = Guard(backend=f"openai:{url}#guard", reasoning="never", timeout=600)

    async def check_many(texts: Sequence[str]) -> None:
        sound(await guard.acheck_many(texts))

    unnamed = Guard(backend=guard.backend, reasoning="never", name_categories=False, timeout=600)

    async def check_unnamed(texts: Sequence[str]) -> None:
        sound(await unnamed.acheck_many(texts))

    own = RSafeGuard(guard, exit_behavior="annotate")
    chain = (
        ChatPromptTemplate.from_messages(
            [("human", before.replace("{", "{{").replace("}", "}}") + "{text}" + after)]
        )
        | ChatOpenAI(base_url=url, model="guard", max_tokens=ANSWER, temperature=0)
        | StrOutputParser()
    )
    llm = OpenAILike(
        api_base=url, api_key="none", model="guard", max_tokens=ANSWER, temperature=0, is_chat_model=True
    )

    async def one_message_at_a_time(texts: Sequence[str]) -> None:
        for text in texts:
            await asyncio.to_thread(llm.complete, before + text + after)

    def through(rails: LLMRails) -> Way:
        async def check(texts: Sequence[str]) -> None:
            messages = ([{"role": "user", "content": text}] for text in texts)
            await asyncio.gather(*(rails.check_async(one, [RailType.INPUT]) for one in messages))

        return check

    own_rails = RailsConfig.from_content(
        yaml_content="import_paths: [rsafe_plugins/rails]\nrails: {input: {flows: [rsafe check input]}}\n"
    )
    own_rails.custom_data = {"rsafe": guard}
    return {
        "Guard.check_many": check_many,
        "Guard.check_many, categories unnamed": check_unnamed,
        "LlamaGuardModeratorPack's way, one message at a time": one_message_at_a_time,
        "LangChain: RSafeGuard": own.abatch,
        "LangChain: prompt | model | parser": lambda texts: chain.abatch([{"text": text} for text in texts]),
        "NeMo: rsafe check input": through(LLMRails(own_rails)),
        "NeMo: content safety check input": through(LLMRails(content_safety(url, before, after))),
    }


def content_safety(url: str, before: str, after: str) -> RailsConfig:
    return RailsConfig(
        models=[
            {
                "type": "content_safety",
                "engine": "openai",
                "model": "guard",
                "parameters": {"base_url": url},
            }
        ],
        rails={"input": {"flows": ["content safety check input $model=content_safety"]}},
        prompts=[
            {
                "task": "content_safety_check_input $model=content_safety",
                "content": before + "{{ user_input }}" + after,
                "output_parser": "is_content_safe",
                "max_tokens": ANSWER,
            }
        ],
    )


async def compare(part: Part, url: str) -> None:
    """All ways in turn, several times over, so that a slow minute of the machine hits them alike."""
    asked = ways(url)
    for way in asked.values():
        await way(texts("warm", 2))
    lists: dict[str, list[float]] = {name: [] for name in asked}
    singles: dict[str, list[float]] = {name: [] for name in asked}
    for run in range(RUNS):
        for name, way in asked.items():
            started = time.perf_counter()
            await way(texts(f"{name} {run}", 50))
            lists[name].append(time.perf_counter() - started)
            for text in texts(f"{name} {run} single", ONE_BY_ONE):
                started = time.perf_counter()
                await way([text])
                singles[name].append(time.perf_counter() - started)
    for name in asked:
        part.add(f"{name}: a list of 50", 50 / statistics.median(lists[name]), "checks/s")
    for name in asked:
        part.add(f"{name}: one check", statistics.median(singles[name]) * 1000, "ms")


def texts(run: str, count: int) -> list[str]:
    return [content.text for content in fifty("prompt", run)[:count]]


def main() -> None:
    with server(sys.argv[1]) as url:
        part = Part("peers", "The guard beside other ways to ask the same model, on one vLLM server")
        asyncio.run(compare(part, url))
        part.save()


if __name__ == "__main__":
    main()
