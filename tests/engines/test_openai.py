"""The conformance kit on a real OpenAI-compatible server, llama.cpp's own, and how far it agrees with the engine."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from rsafe_plugins.backends import LlamaCppBackend, OpenAIBackend
from rsafe_plugins.backends.llama_server import available_cores
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.testing.conformance import BackendConformance, assert_backends_agree

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llama_server() -> Iterator[str]:
    """The server's address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(embedded_weights())
    params.n_ctx = 4096
    params.n_parallel = 1
    params.ctx_shift = False
    params.warmup = False
    params.cpuparams.n_threads = available_cores()
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.ui = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


@pytest.fixture(scope="module")
def make_backend(llama_server: str) -> Callable[[], OpenAIBackend]:
    return lambda: OpenAIBackend(llama_server, timeout=300)


class TestOpenAIBackend(BackendConformance):
    too_long_words = 10_000


def test_the_server_is_found_to_continue_answers_and_to_give_probabilities(backend: OpenAIBackend) -> None:
    assert (backend.supports_prefill, backend.supports_candidates) == (True, True)


def test_a_server_and_the_embedded_engine_agree_on_the_same_weights(backend: OpenAIBackend) -> None:
    embedded = LlamaCppBackend(embedded_weights())
    # A server's answer is read as text, over all the ways to spell a candidate; the engine's is that of one of them.
    assert_backends_agree(backend, embedded, tolerance=0.1)
    asyncio.run(embedded.aclose())
