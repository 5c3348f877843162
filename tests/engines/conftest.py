"""One backend for all tests of a module, which says in `make_backend` how it is made."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from rsafe_plugins.backends import Backend


@pytest.fixture(scope="module")
def backend(make_backend: Callable[[], Backend]) -> Iterator[Backend]:
    backend = make_backend()
    asyncio.run(backend.prepare())
    yield backend
    asyncio.run(backend.aclose())
