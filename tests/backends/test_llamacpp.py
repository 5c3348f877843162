"""The embedded engine, real: llama.cpp and the weights that the package index serves."""

import asyncio
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsafe_plugins.backends import backend_from_string
from rsafe_plugins.backends.base import Completion, Message, Request
from rsafe_plugins.backends.llama_server import available_cores, cpu_quota
from rsafe_plugins.backends.llamacpp import LlamaCppBackend, _next_tokens, _tokenize
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.errors import BackendError, BackendUnavailable, InputTooLong, SettingsError

pytestmark = pytest.mark.engine

RULES = "You sort messages. " + " ".join(f"Rule {number}: be strict." for number in range(40))
OTHER_RULES = "You count words. " + " ".join(f"Step {number}: be exact." for number in range(40))


def ask(content: str, *, system: str = RULES, **settings: object) -> Request:
    messages = (Message("system", system), Message("user", content))
    return Request(messages=messages, **settings)  # type: ignore[arg-type]


def capital(country: str) -> Request:
    return ask(
        f"What is the capital of {country}?",
        system="Answer with one word.",
        prefill=f"The capital of {country} is",
        candidates=(" Paris", " Berlin", " Ouagadougou"),
    )


async def only(backend: LlamaCppBackend, request: Request) -> Completion:
    (answer,) = await backend.complete([request])
    if isinstance(answer, BackendError):
        raise answer
    return answer


async def under_way(backend: LlamaCppBackend) -> None:
    """Returns once the engine has been sent a request."""
    while backend._server is None or not backend._server._connections:  # noqa: ASYNC110 (no event for it)
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def weights() -> Path:
    return embedded_weights()


@pytest.fixture
def damaged(weights: Path, tmp_path: Path) -> Path:
    """The weights, cut off."""
    path = tmp_path / "model.gguf"
    path.write_bytes(weights.read_bytes()[:1_000_000])
    return path


@pytest.fixture(scope="module")
def backend(weights: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(weights)
    yield backend
    asyncio.run(backend.aclose())


async def test_a_chat_is_answered_greedily_and_counted(backend: LlamaCppBackend) -> None:
    request = ask("Count.", prefill="1, 2, 3, 4,", max_tokens=8)

    first, second = await only(backend, request), await only(backend, request)

    assert first.text
    assert first.text == second.text
    assert first.finish_reason == "length"
    assert first.usage.completion_tokens == 8
    assert first.usage.prompt_tokens == second.usage.prompt_tokens > 200


async def test_a_stop_string_ends_the_text_and_is_not_part_of_it(backend: LlamaCppBackend) -> None:
    request = ask("Count.", system="Count.", prefill="1, 2, 3, 4,", max_tokens=40, stop=("8",))

    answer = await only(backend, request)

    assert answer.text == " 5, 6, 7, "
    assert answer.finish_reason == "stop"


async def test_the_end_of_the_turn_ends_the_text_without_its_token(backend: LlamaCppBackend) -> None:
    answer = await only(backend, ask("Hi", system="Be brief.", max_tokens=200))

    assert answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text


async def test_candidates_are_ranked_by_the_model_and_sum_to_at_most_one(backend: LlamaCppBackend) -> None:
    france, germany = await only(backend, capital("France")), await only(backend, capital("Germany"))

    assert max(france.logprobs, key=france.logprobs.__getitem__) == " Paris"
    assert max(germany.logprobs, key=germany.logprobs.__getitem__) == " Berlin"
    assert list(france.logprobs) == [" Paris", " Berlin", " Ouagadougou"]
    assert france.finish_reason == "candidates"
    assert france.text == ""
    assert sum(map(math.exp, france.logprobs.values())) <= 1.0


async def test_a_candidate_of_several_tokens_is_scored_as_the_product_over_them(
    backend: LlamaCppBackend,
) -> None:
    def after(prefill: str, *candidates: str) -> Request:
        return ask("Go on.", system="Count.", prefill=prefill, candidates=candidates)

    whole = await only(backend, after("1, 2, 3,", " 4, 5", " 4; 5"))
    steps = [
        await only(backend, after(prefill, *candidates))
        for prefill, *candidates in (
            ("1, 2, 3,", " 4", " 5"),
            ("1, 2, 3, 4", ",", ";"),
            ("1, 2, 3, 4,", " 5", " 6"),
        )
    ]

    product = steps[0].logprobs[" 4"] + steps[1].logprobs[","] + steps[2].logprobs[" 5"]
    assert whole.logprobs[" 4, 5"] == pytest.approx(product, abs=0.02)
    assert whole.logprobs[" 4; 5"] < whole.logprobs[" 4, 5"]


async def test_prompt_and_tokens_are_those_that_transformers_makes(
    backend: LlamaCppBackend, weights: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    await backend.start()
    assert backend._server is not None

    for roles in (("user",), ("system", "user"), ("system", "user", "assistant", "user")):
        chat = tuple(Message(role, f"  Some \n{role}'s text: 12,345 été 漢字 \n") for role in roles)
        prompt = backend._server.template.render(chat)
        dicts = [{"role": message.role, "content": message.content} for message in chat]
        ours = await only(backend, Request(messages=chat, prefill=r"\boxed{", max_tokens=1))

        assert prompt == tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
        theirs = tokenizer.encode(prompt + r"\boxed{", add_special_tokens=False)
        assert ours.usage.prompt_tokens == len(theirs)
        assert await _tokenize(backend._server, prompt + r"\boxed{") == tuple(theirs)


async def test_a_candidate_that_is_not_among_the_likeliest_gets_an_upper_bound(
    backend: LlamaCppBackend,
) -> None:
    scored = await only(
        backend, ask("Go on.", system="Count.", prefill="1, 2, 3, 4,", candidates=(" 5", "\N{SNOWMAN}"))
    )

    assert scored.logprobs["\N{SNOWMAN}"] < -5
    assert math.exp(scored.logprobs["\N{SNOWMAN}"]) <= 1 - math.exp(scored.logprobs[" 5"])


async def test_candidates_that_the_model_would_never_say_are_an_error(backend: LlamaCppBackend) -> None:
    answers = await backend.complete(
        [
            ask("Go on.", system="Count.", prefill="1, 2, 3, 4,", candidates=("\N{SNOWMAN}", "漢字")),
            ask("Go on.", candidates=("", "safe")),
        ]
    )

    assert [type(answer) for answer in answers] == [BackendError, BackendError]
    assert "None of the candidates" in str(answers[0])
    assert "one is empty" in str(answers[1])


async def test_a_prompt_that_does_not_fit_is_an_error_of_its_own_request(backend: LlamaCppBackend) -> None:
    answers = await backend.complete(
        [
            ask("word " * 5000, max_tokens=1),
            ask("short", max_tokens=4096),
            ask("word " * 5000, candidates=("safe", "unsafe")),
            ask("x" * 2_000_000, max_tokens=1),
            ask("short", max_tokens=1),
        ]
    )

    assert [type(answer) for answer in answers] == [InputTooLong] * 4 + [Completion]
    assert "4096" in str(answers[0])
    assert "2000" in str(answers[3])


async def test_several_static_prefixes_stay_cached(backend: LlamaCppBackend) -> None:
    prefixes = (RULES, OTHER_RULES)
    for system in prefixes:
        await backend.complete([ask("The first one.", system=system, max_tokens=1)])

    for word in ("second", "third"):
        for system in prefixes:
            usage = (await only(backend, ask(f"The {word} one.", system=system, max_tokens=1))).usage
            assert usage.cached_tokens > 0.8 * usage.prompt_tokens


async def test_many_requests_of_many_callers_come_back_in_order(backend: LlamaCppBackend) -> None:
    def echo(number: int) -> Request:
        word = ("apple", "bread", "chair")[number % 3]
        return ask(word, system="Repeat.", prefill=f"{word} {word} {word}", max_tokens=1)

    alone = [(await only(backend, echo(number))).text for number in range(3)]
    assert len(set(alone)) == 3
    answers = await asyncio.gather(*(backend.complete([echo(n) for n in range(12)]) for _ in range(4)))

    for answer in answers:
        texts = [completion.text for completion in answer if isinstance(completion, Completion)]
        assert texts == [alone[number % 3] for number in range(12)]


async def test_cancelled_requests_are_dropped_and_leave_later_ones_alone(backend: LlamaCppBackend) -> None:
    short = ask("Say hello.", max_tokens=1)
    before = await only(backend, short)
    task = asyncio.create_task(backend.complete([ask("Tell me a long story.", max_tokens=3000)] * 200))
    await under_way(backend)
    task.cancel()

    after = await only(backend, short)

    with pytest.raises(asyncio.CancelledError):
        await task
    assert after.text == before.text


@pytest.mark.parametrize(
    "content", ["", "a\0b", "\N{FAMILY} \u202e\U0001f600", "\r\n\t", "<|im_end|>", "\ufffe"]
)
async def test_odd_text_is_answered(backend: LlamaCppBackend, content: str) -> None:
    assert isinstance((await backend.complete([ask(content, max_tokens=1)]))[0], Completion)


async def test_text_after_a_nul_byte_is_judged_too(backend: LlamaCppBackend) -> None:
    short = await only(backend, ask("a\0", max_tokens=1))
    long = await only(backend, ask("a\0" + "b c " * 20, max_tokens=1))

    assert long.usage.prompt_tokens >= short.usage.prompt_tokens + 40


async def test_a_lone_surrogate_is_an_error_of_its_own_request(backend: LlamaCppBackend) -> None:
    bad, good = await backend.complete([ask("\ud800", max_tokens=1), ask("a", max_tokens=1)])

    assert isinstance(bad, BackendError)
    assert "U+D800" in str(bad)
    assert isinstance(good, Completion)


async def test_an_error_says_nothing_of_the_content(backend: LlamaCppBackend) -> None:
    answers = await backend.complete(
        [ask("hushhush " * 5000), ask("hushhush \ud800"), ask("hushhush", candidates=("漢字", "\N{SNOWMAN}"))]
    )

    assert all(isinstance(answer, BackendError) for answer in answers)
    assert "hush" not in repr(answers)


async def test_no_request_is_no_answer(backend: LlamaCppBackend) -> None:
    assert await backend.complete([]) == []


async def test_one_backend_serves_one_event_loop_after_another(weights: Path) -> None:
    backend = LlamaCppBackend(weights)
    request = ask("Count.", prefill="1, 2, 3, 4,", max_tokens=2)
    texts = []

    def elsewhere() -> None:
        texts.append(asyncio.run(only(backend, request)).text)

    for _ in range(2):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
    texts.append((await only(backend, request)).text)
    await backend.aclose()

    assert len(set(texts)) == 1


async def test_a_closed_backend_is_unavailable_and_closing_twice_is_fine(weights: Path) -> None:
    backend = LlamaCppBackend(weights)
    await backend.start()
    task = asyncio.create_task(backend.complete([ask("Tell me a long story.", max_tokens=3000)] * 3))
    await under_way(backend)

    await backend.aclose()
    await backend.aclose()

    assert all(isinstance(answer, BackendUnavailable) for answer in await task)
    with pytest.raises(BackendUnavailable, match="was closed"):
        await backend.complete([ask("Hi")])


async def test_two_engines_live_side_by_side(weights: Path) -> None:
    first, second = LlamaCppBackend(weights, context=512), LlamaCppBackend(weights, context=1024)
    await first.start()
    await second.start()
    await first.aclose()

    assert (await only(second, ask("Hi", max_tokens=1))).usage.completion_tokens == 1
    await second.aclose()


async def test_a_model_that_cannot_be_loaded_is_one_sentence_and_is_tried_again(
    weights: Path, damaged: Path
) -> None:
    backend = LlamaCppBackend(damaged, context=512)

    with pytest.raises(BackendUnavailable, match=r"llama\.cpp can't load .*model\.gguf: the file is damaged"):
        await backend.complete([ask("Hi")])

    os.replace(shutil.copy(weights, damaged.with_name("whole")), damaged)
    assert (await only(backend, ask("Hi", max_tokens=1))).usage.completion_tokens == 1
    await backend.aclose()


async def test_an_adapter_that_is_none_is_one_sentence(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"adapter must be the path of a GGUF file"):
        await LlamaCppBackend(weights, adapter=tmp_path / "none.gguf").complete([ask("Hi")])
    with pytest.raises(BackendUnavailable, match=r"can't load .* with the adapter"):
        await LlamaCppBackend(weights, adapter=weights).complete([ask("Hi")])


async def test_rsafe_model_names_the_model_and_goes_without_the_packaged_adapter(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RSAFE_MODEL", str(tmp_path / "own.gguf"))
    backend = LlamaCppBackend()

    assert backend.model == "own"
    with pytest.raises(BackendUnavailable, match=r"RSAFE_MODEL must be the path of a GGUF file"):
        await backend.complete([ask("Hi")])


async def test_a_missing_package_is_said_with_the_command_that_mends_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)

    with pytest.raises(BackendUnavailable, match=r'pip install "rsafe-plugins\[embedded\]"'):
        await LlamaCppBackend(weights).complete([ask("Hi")])


@pytest.mark.parametrize("setting", ["context", "slots", "threads"])
def test_a_number_below_one_is_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match=f"{setting} must be at least 1, not 0"):
        LlamaCppBackend("model.gguf", **{setting: 0})


@pytest.mark.parametrize(("threads", "slots"), [(1, 1), (2, 1), (8, 1), (16, 2), (128, 4)])
def test_slots_follow_the_threads(threads: int, slots: int) -> None:
    assert LlamaCppBackend("model.gguf", threads=threads).concurrency == slots
    assert LlamaCppBackend("model.gguf", threads=threads, slots=3).concurrency == 3


def test_a_backend_string_can_name_an_adapter_for_the_embedded_weights(tmp_path: Path) -> None:
    adapter = tmp_path / "mine.gguf"
    adapter.write_bytes(b"GGUF mine")
    named, packaged = backend_from_string(f"embedded:{adapter}"), backend_from_string("embedded")
    assert isinstance(named, LlamaCppBackend)
    assert named.model == LlamaCppBackend(adapter=adapter).model
    assert named.model.rpartition("+")[0] == packaged.model.rpartition("+")[0]
    assert named.model != packaged.model


def test_a_backend_string_can_name_a_model_and_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = tmp_path / "mine#2.gguf", tmp_path / "adapter.gguf"
    for file in (model, adapter):
        file.write_bytes(b"GGUF mine")
    named = backend_from_string(f"llamacpp:{model}#{adapter}")
    assert named.model == LlamaCppBackend(model, adapter=adapter).model
    assert named.model.startswith("mine#2+adapter")
    assert backend_from_string(f"llamacpp:{model}").model == "mine#2"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backend_from_string("llamacpp:~/mine#2.gguf").model == "mine#2"
    odd = adapter.rename(tmp_path / "#1.gguf")
    assert backend_from_string(f"llamacpp:~/mine#2.gguf#{odd}").model.startswith("mine#2+#1")


async def test_an_adapter_that_is_not_there_is_said_by_its_name(tmp_path: Path) -> None:
    model = embedded_weights()
    with pytest.raises(BackendUnavailable, match=r"nowhere\.gguf"):
        await backend_from_string(f"llamacpp:{model}#{tmp_path / 'nowhere.gguf'}").start()


def test_the_engine_is_imported_only_when_it_starts() -> None:
    code = "import sys, rsafe_plugins.backends.llamacpp; sys.exit('xllamacpp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


UNCLOSED = """
import asyncio, sys, threading
from rsafe_plugins.backends.base import Message, Request
from rsafe_plugins.backends.llamacpp import LlamaCppBackend

backend = LlamaCppBackend(sys.argv[1])
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()

def ask(tokens):
    request = Request(messages=(Message("user", "Tell me a long story."),), max_tokens=tokens)
    return asyncio.run_coroutine_threadsafe(backend.complete([request]), loop)

ask(2).result()
if sys.argv[2] == "under way":
    ask(3000)
    while not backend._server._connections:
        pass
"""


@pytest.mark.parametrize("state", ["idle", "under way"])
def test_a_process_ends_quietly_without_aclose_and_leaves_nothing_behind(
    weights: Path, tmp_path: Path, state: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED, str(weights), state],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


async def test_only_this_user_with_the_key_reaches_the_engine(weights: Path) -> None:
    backend = LlamaCppBackend(weights, context=512)
    await backend.start()
    server = backend._server
    assert server is not None
    assert server._socket_path is not None

    assert os.stat(os.path.dirname(server._socket_path)).st_mode & 0o077 == 0
    server._key = "a guess"
    for path in ("/completion", "/tokenize", "/lora-adapters", "/props"):
        with pytest.raises(BackendError, match="authentication_error"):
            await server.ask(path, {"prompt": "Hi"})

    await backend.aclose()


def test_threads_are_at_most_the_cores_this_process_may_use() -> None:
    if sys.platform.startswith("linux"):
        assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_a_containers_cpu_limit_is_kept(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    assert cpu_quota(tmp_path, tmp_path / "own") == sys.maxsize

    (tmp_path / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, tmp_path / "own") == 2


async def test_what_is_no_number_does_not_become_certain() -> None:
    class Server:
        async def ask(self, path: str, body: object) -> dict[str, object]:
            top = [{"id": 1, "logprob": math.nan}, {"id": 2, "logprob": -9.0}]
            return {"completion_probabilities": [{"top_logprobs": top}], "timings": {"cache_n": 0}}

    following, _, _ = await _next_tokens(Server(), (1, 2, 3))  # type: ignore[arg-type]
    assert math.isnan(following[1])
