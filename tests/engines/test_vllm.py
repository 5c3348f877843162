"""The conformance kit on vLLM with real weights, in the environment that `make test-engines` makes for it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from rsafe_plugins import Content, Policy
from rsafe_plugins.alignment.export import export_folder
from rsafe_plugins.backends import Backend, Completion, Request, TransformersBackend, VLLMBackend
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.errors import BackendUnavailable
from rsafe_plugins.guard.prompt import GuardPrompt
from rsafe_plugins.testing.conformance import BackendConformance, assert_backends_agree

pytestmark = pytest.mark.vllm

CONTEXT = 2048


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded guard's weights as a Hugging Face folder, since this engine reads no GGUF."""
    return export_folder(embedded_weights(), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def make_backend(folder: Path) -> Callable[[], VLLMBackend]:
    return lambda: VLLMBackend(folder, context=CONTEXT, dtype="float32", enforce_eager=True, block_size=32)


class TestVLLMBackend(BackendConformance):
    too_long_words = 10_000


def test_vllm_and_transformers_agree_on_the_same_weights(backend: Backend, folder: Path) -> None:
    other = TransformersBackend(folder, dtype="float32")
    assert_backends_agree(backend, other)
    asyncio.run(other.aclose())


def test_policies_are_served_from_the_prefix_cache(backend: Backend) -> None:
    # These weights aren't a guard's, and a guard that answers something else is a failed check.
    prompt, policy = GuardPrompt(), Policy.load("rsafe-18")
    chats = [prompt.messages(policy, Content.prompt(text)) for text in ("How do I bake bread?", "Hello.")]
    requests = [Request(messages=chat, prefill="\\boxed{", candidates=("safe", "unsafe")) for chat in chats]
    _, second = [asyncio.run(backend.complete([request]))[0] for request in requests]
    assert isinstance(second, Completion)
    assert second.usage.cached_tokens >= 0.95 * (second.usage.prompt_tokens - 25)


def test_an_engine_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"^vLLM can't start with .*\.$"):
        asyncio.run(VLLMBackend(tmp_path).start())
    with pytest.raises(BackendUnavailable, match=r"^vLLM refuses an engine argument \(.*'colour'.*\)\.$"):
        asyncio.run(VLLMBackend(tmp_path, colour="red").start())
