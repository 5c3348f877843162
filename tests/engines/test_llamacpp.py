"""The conformance kit on llama.cpp and the weights that the package index serves."""

from collections.abc import Callable

import pytest

from rsafe_plugins.backends.llamacpp import LlamaCppBackend
from rsafe_plugins.backends.weights import embedded_weights
from rsafe_plugins.testing.conformance import BackendConformance

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def make_backend() -> Callable[[], LlamaCppBackend]:
    weights = embedded_weights()
    return lambda: LlamaCppBackend(weights)


class TestLlamaCppBackend(BackendConformance):
    too_long_words = 10_000
