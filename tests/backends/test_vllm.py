"""What can be told of the vLLM engine where vLLM isn't installed; tests/engines has the real one."""

import asyncio
import threading

import pytest

from rsafe_plugins import Guard
from rsafe_plugins.backends import VLLMBackend, backend_from_string
from rsafe_plugins.errors import BackendUnavailable, SettingsError


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
    assert not [thread for thread in threading.enumerate() if thread.name == "rsafe-vllm"]


def test_a_closed_backend_is_unavailable_and_closing_twice_is_fine() -> None:
    backend = VLLMBackend("org/model")
    asyncio.run(backend.aclose())
    assert not [thread for thread in threading.enumerate() if thread.name == "rsafe-vllm"]
    asyncio.run(backend.aclose())
    assert not [thread for thread in threading.enumerate() if thread.name == "rsafe-vllm"]
    with pytest.raises(BackendUnavailable, match="was closed"):
        asyncio.run(backend.complete([]))
