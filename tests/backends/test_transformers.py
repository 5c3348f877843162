"""The transformers engine on a model that is as small as a Llama can be."""

import asyncio
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rsafe_plugins.backends import causal_lm
from rsafe_plugins.backends.base import Backend, Completion, Message, Request
from rsafe_plugins.backends.causal_lm import CausalLM
from rsafe_plugins.backends.tokens import common_length
from rsafe_plugins.backends.transformers import TransformersBackend
from rsafe_plugins.errors import BackendError, BackendUnavailable, InputTooLong, SettingsError
from rsafe_plugins.testing.conformance import BackendConformance, assert_backends_agree

pytestmark = pytest.mark.align

CONTEXT = 2048
POLICIES = tuple(f"{word} the messages. " + f"The {word} rule is strict. " * 8 for word in ("Sort", "Count"))


def ask(content: str, *, system: str = POLICIES[0], **settings: Any) -> Request:
    return Request(messages=(Message("system", system), Message("user", content)), **settings)


def label(content: str, *, system: str = POLICIES[0]) -> Request:
    return ask(content, system=system, prefill="\\boxed{", candidates=("safe", "unsafe"))


async def only(backend: Backend, request: Request) -> Completion:
    (answer,) = await backend.complete([request])
    assert isinstance(answer, Completion), answer
    return answer


def make_model(folder: Path, **config: Any) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "{unsafe" merges across the end of the guard's prefill; "safe" and "unsafe" share no first token.
    merges = [("s", "a"), ("f", "e"), ("sa", "fe"), ("u", "n"), ("{", "un")]
    names = ["<|im_start|>", "<|im_end|>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.5,  # else all tokens are about as likely
            eos_token_id=1,
            **config,
        )
    )
    model.save_pretrained(str(folder))
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def make_backend(tiny: Path) -> Callable[[], TransformersBackend]:
    return lambda: TransformersBackend(tiny, device="cpu")


@pytest.fixture(scope="module")
def backend(make_backend: Callable[[], TransformersBackend]) -> Iterator[TransformersBackend]:
    backend = make_backend()
    yield backend
    asyncio.run(backend.aclose())


@pytest.fixture
def fresh(make_backend: Callable[[], TransformersBackend]) -> Iterator[TransformersBackend]:
    """A backend that has cached nothing yet."""
    backend = make_backend()
    yield backend
    asyncio.run(backend.aclose())


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Callable[[str, str], float]:
    """The log-probability of a text right after another, computed the plain way."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)

    def logprob(before: str, after: str) -> float:
        tokens = tokenizer(before, add_special_tokens=False)["input_ids"]
        whole = tokenizer(before + after, add_special_tokens=False)["input_ids"]
        start = common_length(tuple(tokens), tuple(whole))
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return float(sum(logprobs[at - 1, whole[at]] for at in range(start, len(whole))))

    return logprob


def prompt_of(request: Request) -> str:
    chat = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in request.messages)
    return f"{chat}<|im_start|>assistant\n{request.prefill}"


class TestTransformersBackend(BackendConformance):
    too_long_words = CONTEXT
    can_count = False
    patience = 60.0


async def test_a_score_is_the_sum_over_the_candidates_tokens(
    backend: TransformersBackend, reference: Callable[[str, str], float]
) -> None:
    request = ask("Hello", prefill="So: ", candidates=("safe", "sable", "unsafe", "of course, 漢"))

    scored = await only(backend, request)

    for name in request.candidates:
        assert scored.logprobs[name] == pytest.approx(reference(prompt_of(request), name), abs=1e-3)


async def test_a_candidate_that_merges_with_the_prefill_is_scored_from_before_the_merge(
    backend: TransformersBackend, reference: Callable[[str, str], float]
) -> None:
    scored = await only(backend, label("Hello"))

    before = prompt_of(label("Hello")).removesuffix("{")
    for name in ("safe", "unsafe"):
        assert scored.logprobs[name] == pytest.approx(reference(before, "{" + name), abs=1e-3)


async def test_a_batch_gives_the_scores_and_texts_of_single_requests(
    fresh: TransformersBackend, tiny: Path
) -> None:
    contents = ["", "a", "How do I bake bread?", "word " * 60, "漢字 \U0001f600", "x" * 31, "word " * 7]
    one_by_one = TransformersBackend(tiny, device="cpu", batch_size=1)
    for build in (label, lambda content: ask(content, max_tokens=20)):
        requests = [build(content) for content in contents]

        for together, alone in zip(
            await fresh.complete(requests), await one_by_one.complete(requests), strict=True
        ):
            assert isinstance(together, Completion)
            assert isinstance(alone, Completion)
            assert together.text == alone.text
            assert together.finish_reason == alone.finish_reason
            assert dict(together.logprobs) == pytest.approx(dict(alone.logprobs), abs=1e-4)
    await one_by_one.aclose()


async def test_a_static_prefix_is_computed_once_and_changes_nothing(fresh: TransformersBackend) -> None:
    first = await only(fresh, label("The first one."))
    second = await only(fresh, label("Another one, longer."))
    third = await only(fresh, label("And a third."))
    again = await only(fresh, label("The first one."))
    text = await only(fresh, ask("And a third.", max_tokens=12))

    assert [first.usage.cached_tokens, second.usage.cached_tokens] == [0, 0]
    assert third.usage.cached_tokens > 0.8 * third.usage.prompt_tokens
    assert again.usage.cached_tokens > 0.8 * again.usage.prompt_tokens
    assert dict(again.logprobs) == pytest.approx(dict(first.logprobs), abs=1e-4)
    assert text.usage.cached_tokens > 200
    untouched = TransformersBackend(fresh._model, device="cpu")
    assert text.text == (await only(untouched, ask("And a third.", max_tokens=12))).text
    await untouched.aclose()


async def test_a_batch_computes_its_prefix_once(fresh: TransformersBackend) -> None:
    answers = await fresh.complete([label(f"Text {number}.") for number in range(6)])

    cached = [answer.usage.cached_tokens for answer in answers if isinstance(answer, Completion)]
    assert cached[0] == 0
    assert min(cached[1:]) > 200


async def test_several_static_prefixes_stay_cached(fresh: TransformersBackend) -> None:
    for number, system in itertools.product(range(3), POLICIES):
        await fresh.complete([label(f"Text {number}.", system=system)])

    for system in POLICIES:
        usage = (await only(fresh, label("The last one.", system=system))).usage
        assert usage.cached_tokens > 0.8 * usage.prompt_tokens


async def test_a_cached_prefix_is_never_changed(fresh: TransformersBackend) -> None:
    await fresh.complete([label(f"Text {number}.") for number in range(3)])
    assert fresh._engine is not None
    (layers,) = fresh._engine._prefixes.values()
    before = [(keys.clone(), values.clone()) for keys, values in layers]

    await fresh.complete([ask(f"Text {number}.", max_tokens=9) for number in range(5)])

    (layers,) = fresh._engine._prefixes.values()
    for old, new in zip(before, layers, strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1], new[1])


async def test_no_more_than_four_prefixes_are_kept(fresh: TransformersBackend) -> None:
    for word, number in itertools.product(("one", "two", "three", "four", "five", "six"), range(2)):
        await fresh.complete([label(f"Text {number}.", system=f"Policy {word}. " * 20)])

    assert fresh._engine is not None
    assert len(fresh._engine._prefixes) == 4


async def test_requests_of_several_policies_in_one_call_share_what_is_theirs(
    fresh: TransformersBackend,
) -> None:
    requests = [label(f"Text {number}.", system=POLICIES[number % 2]) for number in range(12)]
    answers = await fresh.complete(requests)

    for request, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, Completion)
        untouched = TransformersBackend(fresh._model, device="cpu")
        alone = await only(untouched, request)
        await untouched.aclose()
        assert dict(answer.logprobs) == pytest.approx(dict(alone.logprobs), abs=1e-4)
    cached = [answer.usage.cached_tokens for answer in answers if isinstance(answer, Completion)]
    assert sum(tokens > 200 for tokens in cached) == 10


async def test_a_sliding_window_sees_what_it_would_see_alone(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    folder = make_model(tmp_path)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = MistralConfig(
        vocab_size=270, sliding_window=40, max_position_embeddings=CONTEXT, **small, **heads
    )
    MistralForCausalLM(config).save_pretrained(str(folder))
    backend = TransformersBackend(folder, device="cpu")
    requests = [label("word " * number) for number in (1, 9, 4)]

    for request, answer in zip(requests, await backend.complete(requests), strict=True):
        assert isinstance(answer, Completion)
        alone = TransformersBackend(folder, device="cpu")
        assert dict(answer.logprobs) == pytest.approx(dict((await only(alone, request)).logprobs), abs=1e-4)
    await backend.aclose()


async def test_a_request_too_long_for_the_model_says_how_long_it_is(backend: TransformersBackend) -> None:
    answers = await backend.complete(
        [
            ask("word " * CONTEXT, max_tokens=1),
            ask("short", max_tokens=CONTEXT),
            ask("word " * CONTEXT, candidates=("safe", "unsafe")),
            ask("x" * 600_000, max_tokens=1),
            ask("short", max_tokens=1),
        ]
    )

    assert [type(answer) for answer in answers] == [InputTooLong] * 4 + [Completion]
    assert "2048" in str(answers[0])
    assert "6002" in str(answers[3])


async def test_a_smaller_context_is_kept_to(tiny: Path) -> None:
    backend = TransformersBackend(tiny, device="cpu", context=64)

    (answer,) = await backend.complete([ask("short", max_tokens=1)])

    assert isinstance(answer, InputTooLong)
    await backend.aclose()


async def test_a_running_generation_ends_when_all_its_requests_are_cancelled(
    fresh: TransformersBackend,
) -> None:
    await fresh.start()
    engine, steps = fresh._engine, itertools.count()
    assert engine is not None
    engine._ends = frozenset()  # nothing but the budget ends the text
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_step(*_: Any) -> None:
        next(steps)
        loop.call_soon_threadsafe(begun.set)

    engine._model.register_forward_hook(on_step)
    task = asyncio.create_task(fresh.complete([ask("a", max_tokens=1500), ask("b", max_tokens=1500)]))
    await asyncio.wait_for(begun.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await only(fresh, ask("a", max_tokens=1))

    assert next(steps) < 1000


async def test_a_request_cancelled_before_it_starts_is_never_computed(fresh: TransformersBackend) -> None:
    await fresh.start()
    assert fresh._engine is not None
    begun, gate, steps = asyncio.Event(), threading.Event(), itertools.count()
    loop = asyncio.get_running_loop()

    def on_step(*_: Any) -> None:
        next(steps)
        loop.call_soon_threadsafe(begun.set)
        gate.wait()

    fresh._engine._model.register_forward_hook(on_step)
    running = asyncio.create_task(fresh.complete([ask("first", max_tokens=3)]))
    await asyncio.wait_for(begun.wait(), 60)
    waiting = [asyncio.create_task(fresh.complete([label("never")])) for _ in range(20)]
    while len(fresh._inbox) < 20:  # noqa: ASYNC110 (no event for it)
        await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    gate.set()
    await running
    await only(fresh, ask("later", system="Hi.", max_tokens=1))

    assert all(task.cancelled() for task in waiting)
    assert next(steps) == 4


async def test_an_engine_that_breaks_is_an_error_and_says_nothing_of_the_content(
    fresh: TransformersBackend,
) -> None:
    await fresh.start()
    assert fresh._engine is not None

    def broken(*_: Any) -> None:
        raise RuntimeError("hushhush")

    hook = fresh._engine._model.register_forward_pre_hook(broken)
    (answer,) = await fresh.complete([ask("hushhush")])
    hook.remove()

    assert isinstance(answer, BackendError)
    assert "RuntimeError" in str(answer)
    assert "hushhush" not in str(answer)
    assert (await only(fresh, ask("a", max_tokens=1))).usage.completion_tokens == 1


@pytest.mark.parametrize(("fits", "kinds"), [(3, [Completion] * 6), (2, [BackendError] * 6)])
async def test_a_batch_that_memory_is_too_small_for_is_halved_once(
    fresh: TransformersBackend, fits: int, kinds: list[type]
) -> None:
    await fresh.start()
    assert fresh._engine is not None

    def limited(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > fits:
            raise torch.OutOfMemoryError

    fresh._engine._model.register_forward_pre_hook(limited, with_kwargs=True)
    answers = await fresh.complete([ask(f"Text {number}.", max_tokens=3) for number in range(6)])

    assert [type(answer) for answer in answers] == kinds


async def test_an_output_that_is_no_number_is_an_error(fresh: TransformersBackend) -> None:
    await fresh.start()
    assert fresh._engine is not None
    with torch.no_grad():
        fresh._engine._model.model.norm.weight.fill_(math.nan)

    answers = await fresh.complete([ask("a", max_tokens=3), label("a")])

    assert all(isinstance(answer, BackendError) and "no number" in str(answer) for answer in answers)


async def test_a_chat_that_the_template_refuses_is_an_error_of_its_own_request(
    backend: TransformersBackend,
) -> None:
    bad, good = await backend.complete(
        [Request(messages=(Message("assistant", "Hello"),)), ask("a", max_tokens=1)]
    )

    assert isinstance(bad, BackendError)
    assert "refuses a chat of the roles ['assistant']" in str(bad)
    assert isinstance(good, Completion)


async def test_an_empty_candidate_is_an_error(backend: TransformersBackend) -> None:
    (answer,) = await backend.complete([ask("a", candidates=("", "safe"))])

    assert isinstance(answer, BackendError)
    assert "one is empty" in str(answer)


async def test_an_adapter_changes_the_scores_and_is_named(tiny: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path / "mine"))
    plain = TransformersBackend(tiny, device="cpu")
    merged = TransformersBackend(tiny, adapter=tmp_path / "mine", device="cpu")
    beside = TransformersBackend(tiny, adapter=tmp_path / "mine", device="cpu", dtype="bfloat16")

    scores = [(await only(one, label("Hello"))).logprobs["safe"] for one in (plain, merged, beside)]

    assert merged.model == f"{tiny.name}+mine"
    assert abs(scores[1] - scores[0]) > 0.05
    assert abs(scores[2] - scores[1]) < 0.5 * abs(scores[1] - scores[0])
    for one in (plain, merged, beside):
        await one.aclose()


def test_two_backends_with_the_same_weights_agree(
    backend: TransformersBackend, fresh: TransformersBackend
) -> None:
    assert_backends_agree(backend, fresh, tolerance=1e-3)


def test_two_backends_with_other_weights_do_not_agree(backend: TransformersBackend, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(-1)
    model.save_pretrained(str(folder))

    with pytest.raises(AssertionError, match="differ by a probability of"):
        assert_backends_agree(backend, TransformersBackend(folder, device="cpu"), tolerance=1e-6)


async def test_a_load_that_fails_is_tried_once_for_all_who_wait_and_again_later(tmp_path: Path) -> None:
    backend = TransformersBackend(tmp_path / "tiny", device="cpu")
    waiting = await asyncio.gather(*(backend.complete([ask("a")]) for _ in range(20)), return_exceptions=True)

    assert {type(answer) for answer in waiting} == {BackendUnavailable}
    (tmp_path / "tiny").mkdir()
    make_model(tmp_path / "tiny")
    assert (await only(backend, ask("a", max_tokens=1))).usage.completion_tokens == 1
    await backend.aclose()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("./none", {}, r"model must be a folder, .* there is no \./none\.$"),
        ("none.gguf", {}, r"model must be .* there is no none\.gguf\.$"),
        ("tiny", {"adapter": "./none"}, r"adapter must be .* there is no \./none\.$"),
        ("tiny", {"adapter": "tiny"}, r"transformers can't load .*tiny with the adapter .*tiny \("),
        ("empty", {}, r"transformers can't load .*empty \("),
        ("speechless", {}, r"speechless comes without a chat template"),
        ("tiny", {"device": "cuda"}, r"torch sees no CUDA device"),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, model: str, settings: dict[str, str], message: str
) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("There is a CUDA device.")
    for name in ("tiny", "empty", "speechless"):
        (tmp_path / name).mkdir()
    make_model(tmp_path / "tiny")
    make_model(tmp_path / "speechless")
    (tmp_path / "speechless" / "chat_template.jinja").unlink()
    paths = {name: str(tmp_path / name) for name in ("tiny", "empty", "speechless")}
    settings = {"device": "cpu"} | {name: paths.get(value, value) for name, value in settings.items()}

    with pytest.raises(BackendUnavailable, match=message):
        await TransformersBackend(paths.get(model, model), **settings).complete([ask("a")])  # type: ignore[arg-type]


async def test_a_model_with_a_recurrent_state_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    folder = make_model(tmp_path)
    config = MambaConfig(vocab_size=270, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(str(folder))

    with pytest.raises(BackendUnavailable, match="MambaForCausalLM keeps a recurrent state"):
        await TransformersBackend(folder, device="cpu").complete([ask("a")])


@pytest.mark.parametrize("package", ["torch", "transformers"])
async def test_a_missing_package_is_named_with_what_to_install(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.delitem(sys.modules, causal_lm.__name__)
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(BackendUnavailable, match=r'pip install "rsafe-plugins\[transformers\]"'):
        await TransformersBackend(tiny).complete([ask("a")])


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"context": 0}, {"dtype": "int4"}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_that_cannot_be_used_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        TransformersBackend("any/model", **settings)


@pytest.mark.parametrize(
    ("model", "name"), [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("folder/guard.Q4.gguf", "guard.Q4")]
)
def test_a_model_is_named_as_its_users_know_it(model: str, name: str) -> None:
    assert TransformersBackend(model).model == name


def test_candidates_that_begin_alike_share_a_row(tiny: Path) -> None:
    engine = CausalLM(causal_lm.load(str(tiny), adapter=None, device="cpu", dtype=None))

    assert len(engine.encode(ask("a", candidates=("bcd", "xylem"))).paths) == 2
    assert len(engine.encode(ask("a", candidates=("safe", "un"))).paths) == 1
    assert len(engine.encode(ask("a", candidates=("abc", "abd", "ax"))).paths) == 1


def test_threads_share_one_backend(backend: TransformersBackend) -> None:
    def alone(number: int) -> int:
        return asyncio.run(only(backend, ask("word " * number, max_tokens=1))).usage.prompt_tokens

    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(alone, range(8)))

    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 8
