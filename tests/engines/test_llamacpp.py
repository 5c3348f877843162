"""The conformance kit on llama.cpp and the weights that the package index serves."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from rsafe_plugins.backends.llamacpp import LlamaCppBackend
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.testing.conformance import BackendConformance

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def make_backend() -> Callable[[], LlamaCppBackend]:
    weights = embedded_weights()
    return lambda: LlamaCppBackend(weights)


@pytest.fixture(scope="module")
def backend(make_backend: Callable[[], LlamaCppBackend]) -> Iterator[LlamaCppBackend]:
    backend = make_backend()
    yield backend
    asyncio.run(backend.aclose())


class TestLlamaCppBackend(BackendConformance):
    too_long_words = 10_000
