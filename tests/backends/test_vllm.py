"""What can be told of the vLLM engine where vLLM isn't installed; tests/engines has the real one."""

import asyncio
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from rsafe_plugins import Guard
from rsafe_plugins.backends import Completion, Message, Request, VLLMBackend, backend_from_string
from rsafe_plugins.errors import BackendError, BackendUnavailable, SettingsError


@pytest.mark.parametrize("setting", ["context", "tensor_parallel", "concurrency"])
def test_a_number_below_one_is_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match=f"{setting} must be at least 1, not 0"):
        VLLMBackend("model", **{setting: 0})


def test_the_backend_string_and_the_adapter_name_the_model() -> None:
    assert backend_from_string("vllm:org/model").model == "org/model"
    assert VLLMBackend("org/model", adapter="path/to/mine").model == "org/model+mine"


def test_a_missing_package_blocks_and_is_said_with_the_command_that_mends_it() -> None:
    backend = VLLMBackend("org/model")
    verdict = Guard(backend=backend).check("x")
    assert (verdict.label, verdict.blocked) == (None, True)
    assert verdict.error is not None
    assert 'pip install "rsafe-plugins[vllm]"' in verdict.error
    assert Guard(backend=backend).check("y").error == verdict.error  # tried again, and said again
    asyncio.run(backend.aclose())
    assert not threads()


def test_a_closed_backend_is_unavailable_and_closing_twice_is_fine() -> None:
    backend = VLLMBackend("org/model")
    asyncio.run(backend.aclose())
    assert not threads()
    asyncio.run(backend.aclose())
    assert not threads()
    with pytest.raises(BackendUnavailable, match="was closed"):
        asyncio.run(backend.complete([]))


class Output:
    """What vLLM gives for a request, as far as the backend reads it."""

    def __init__(self, text: str, reason: str) -> None:
        self.finished, self.prompt_token_ids, self.num_cached_tokens = True, [1], 0
        self.outputs = [SimpleNamespace(text=text, finish_reason=reason, token_ids=[1], logprobs=None)]


class Engine:
    """An engine that ends each request for the reason that its prompt names, or never."""

    made: ClassVar[list["Engine"]] = []

    def __init__(self) -> None:
        self.errored = self.was_shut_down = False
        self.model_config = SimpleNamespace(max_model_len=1000)
        Engine.made.append(self)

    @classmethod
    def from_engine_args(cls, args: object) -> "Engine":
        return cls()

    def get_tokenizer(self) -> "Tokenizer":
        return Tokenizer()

    async def generate(self, prompt: dict[str, list[str]], *_: object, **__: object) -> AsyncIterator[Output]:
        word = prompt["prompt_token_ids"][0]
        if word == "hang":
            await asyncio.Event().wait()
        if word == "die":
            self.errored = True
            raise RuntimeError("quoting SECRET")
        if word == "exit":
            raise SystemExit
        yield Output("text", word)

    def shutdown(self) -> None:
        self.was_shut_down = True


class Tokenizer:
    chat_template = "x"

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: object) -> str:
        return conversation[-1]["content"]

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[str]]]:
        return {"input_ids": [[text] for text in texts]}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that are made, in place of vLLM's: what the real one does can't be brought about at will."""
    parts = {
        "vllm": {"AsyncEngineArgs": dict, "SamplingParams": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda *args: args},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": Engine},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Engine, "made", [])
    return Engine.made


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rsafe-vllm"]


def ask(text: str) -> Request:
    return Request(messages=(Message("user", text),))


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
async def test_what_vllm_did_not_finish_is_an_error(engines: list[Engine], reason: str) -> None:
    backend = VLLMBackend("m")
    good, bad = await backend.complete([ask("stop"), ask(reason)])
    assert isinstance(good, Completion)
    assert isinstance(bad, BackendError)
    await backend.aclose()
    assert engines[0].was_shut_down
    assert not threads()


async def test_an_engine_that_died_is_ended_and_another_one_started(engines: list[Engine]) -> None:
    backend = VLLMBackend("m")
    (answer,) = await backend.complete([ask("die")])
    assert isinstance(answer, BackendUnavailable)
    assert "SECRET" not in "".join(traceback.format_exception(answer))
    (answer,) = await backend.complete([ask("stop")])
    assert isinstance(answer, Completion)
    assert [engine.was_shut_down for engine in engines] == [True, False]
    await backend.aclose()
    assert not threads()


async def test_an_engine_that_exits_takes_nobody_with_it(engines: list[Engine]) -> None:
    backend = VLLMBackend("m")
    exited, answer = await backend.complete([ask("exit"), ask("stop")])
    assert isinstance(exited, BackendError)
    assert isinstance(answer, Completion)
    await backend.aclose()


async def test_requests_under_way_end_when_the_backend_is_closed(engines: list[Engine]) -> None:
    backend = VLLMBackend("m")
    under_way = asyncio.create_task(backend.complete([ask("hang")] * 3))
    await backend.complete([ask("stop")])
    await backend.aclose()
    assert {type(answer) for answer in await under_way} == {BackendUnavailable}
    assert not threads()


async def test_a_request_that_ends_in_the_loops_last_turn_is_answered(engines: list[Engine]) -> None:
    backend = VLLMBackend("m")
    await backend.start()
    running = backend._running
    assert running is not None
    asked: list[asyncio.Future[object]] = []

    def close_between_a_request_and_its_first_step() -> None:
        asked.append(asyncio.run_coroutine_threadsafe(running._answer(ask("hang")), running._loop))
        running._loop.call_soon(running._end_loop)

    running._loop.call_soon_threadsafe(close_between_a_request_and_its_first_step)
    await asyncio.to_thread(running._thread.join)
    answer = await asyncio.wait_for(asyncio.wrap_future(asked[0]), 10)
    assert isinstance(answer, BackendUnavailable)


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(), KeyboardInterrupt()])
async def test_a_start_that_fails_leaves_no_engine_and_no_thread(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: Engine) -> Tokenizer:
        raise error

    monkeypatch.setattr(Engine, "get_tokenizer", fail)
    backend = VLLMBackend("m")
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match="vLLM can't start with m"):
            await backend.start()
    await backend.aclose()
    assert [engine.was_shut_down for engine in engines] == [True] * 3
    assert not threads()


async def test_closing_while_it_starts_ends_the_start(engines: list[Engine]) -> None:
    backend = VLLMBackend("m")
    starting = asyncio.create_task(backend.complete([ask("hang")]))
    await asyncio.sleep(0)
    await backend.aclose()
    try:
        answers = await starting
    except BackendUnavailable as error:
        answers = [error]
    assert [type(answer) for answer in answers] == [BackendUnavailable]
    assert all(engine.was_shut_down for engine in engines)
    assert not threads()


async def test_a_forked_child_is_told_and_closes_without_waiting(engines: list[Engine]) -> None:
    backend = VLLMBackend("m")
    await backend.start()
    running = backend._running
    assert running is not None
    running.pid += 1  # as a child sees it: the thread is another process's
    with pytest.raises(BackendUnavailable, match="before its process was forked"):
        await backend.complete([ask("stop")])
    await asyncio.wait_for(backend.aclose(), 5)
    running.pid -= 1
    running.stop()
    assert not threads()
