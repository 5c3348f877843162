"""The conformance kit on transformers with real weights, and its agreement with llama.cpp on them."""

import asyncio
from collections.abc import Callable

import pytest

from rsafe_plugins.backends.llamacpp import LlamaCppBackend
from rsafe_plugins.backends.transformers import TransformersBackend
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.testing.conformance import BackendConformance, assert_backends_agree

pytestmark = [pytest.mark.engine, pytest.mark.align]


@pytest.fixture(scope="module")
def make_backend() -> Callable[[], TransformersBackend]:
    weights = embedded_weights()
    return lambda: TransformersBackend(weights)


class TestTransformersBackend(BackendConformance):
    too_long_words = 20_000


def test_transformers_and_llamacpp_agree_on_the_same_weights(backend: TransformersBackend) -> None:
    other = LlamaCppBackend(embedded_weights())
    assert_backends_agree(backend, other)
    asyncio.run(other.aclose())
