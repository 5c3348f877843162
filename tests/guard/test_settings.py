import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rsafe_plugins import Category, Guard, Policy, SettingsError
from rsafe_plugins.testing import ScriptedBackend


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def guard(**settings: Any) -> Guard:
    return Guard(backend=ScriptedBackend(), **settings)


def test_arguments_come_before_the_environment_and_that_before_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("rsafe.yaml").write_text("policy: mlcommons\nthreshold: 0.2\ntimeout: 5\n")
    monkeypatch.setenv("RSAFE_POLICY", "prompt-injection")
    monkeypatch.setenv("RSAFE_THRESHOLD", "0.3")
    settings = guard(threshold=0.4).settings
    assert (settings.policy, settings.threshold, settings.timeout) == ("prompt-injection", 0.4, 5.0)


def test_an_adapters_block_of_settings_takes_the_same_keys() -> None:
    made = Guard.of({"backend": ScriptedBackend(), "policy": "mlcommons", "on_error": "allow"})
    assert (made.policy.name, made.settings.on_error) == ("mlcommons", "allow")


def test_a_guard_stays_the_guard_it_is() -> None:
    mine = guard()
    assert Guard.of(mine) is mine


def test_a_policy_object_is_taken_as_it_is() -> None:
    policy = Policy(name="mine", categories=(Category(id="A", name="a"),))
    assert guard(policy=policy).policy is policy


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.5}, "'threshold' can't be 1.5"),
        ({"threshold": float("nan")}, "'threshold'"),
        ({"band": (0.8, 0.2)}, "'band'"),
        ({"band": (0.1,)}, "'band'"),
        ({"timeout": 0}, "'timeout' can't be 0"),
        ({"timeout": float("inf")}, "'timeout'"),
        ({"max_reasoning_tokens": 0}, "'max_reasoning_tokens' can't be 0"),
        ({"reasoning": "sometimes"}, "'never', 'always' or 'adaptive'"),
        ({"on_error": "ignore"}, "'block', 'allow' or 'raise'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        guard(**settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_threshold_is_a_number_also_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSAFE_THRESHOLD", "0.25")
    assert guard().operating_point.threshold == 0.25


def test_an_unknown_backend_is_named_with_what_there_is() -> None:
    with pytest.raises(SettingsError, match=r"'embedded'.*'steam'"):
        Guard(backend="steam")


@pytest.mark.parametrize("text", ["polcy: x", "- a", "threshold: [", "\x00", "threshold: high"])
def test_a_bad_settings_file_is_one_clear_sentence(text: str) -> None:
    Path("rsafe.yaml").write_text(text)
    with pytest.raises(SettingsError):
        guard()


def test_a_misspelt_key_is_named_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"'polcy'.*policy, backend"):
        Guard.of({"polcy": "rsafe-18"})


def test_guards_that_name_the_same_engine_share_it() -> None:
    with ThreadPoolExecutor(8) as pool:
        backends = set(pool.map(lambda n: Guard(backend="llamacpp:shared.gguf").backend, range(8)))
    assert len(backends) == 1


@pytest.mark.parametrize(
    "text", ["llamacpp:closed.gguf", "transformers:closed", "openai:http://127.0.0.1:1/v1#closed"]
)
def test_an_engine_that_was_closed_is_not_shared_any_more(text: str) -> None:
    first = Guard(backend=text).backend
    asyncio.run(first.aclose())
    second = Guard(backend=text).backend
    assert first.closed
    assert not second.closed


@pytest.mark.parametrize(
    "name",
    ["threshold", "category_threshold", "timeout", "cache", "max_reasoning_tokens", "policy_tokens"],
)
def test_a_switch_is_no_number(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}.*must be a number"):
        guard(**{name: True})
    Path("rsafe.yaml").write_text(f"{name}: yes\n")
    with pytest.raises(SettingsError, match=f"{name}.*must be a number"):
        guard()


def test_a_file_of_settings_that_is_a_directory_is_not_passed_over() -> None:
    Path("rsafe.yaml").mkdir()
    with pytest.raises(SettingsError, match="is a directory"):
        guard()


def test_a_name_that_is_no_text_is_said() -> None:
    with pytest.raises(SettingsError, match="a setting's name is text, not 1"):
        Guard.of({1: 2})  # type: ignore[dict-item]
    for text in ("1: 2\n", "[" * 3000):
        Path("rsafe.yaml").write_text(text)
        with pytest.raises(SettingsError, match="be read as a mapping"):
            guard()


def test_a_copy_of_a_guard_is_the_guard() -> None:
    mine = guard()
    assert copy.deepcopy({"guard": mine})["guard"] is mine


@pytest.mark.parametrize(("variable", "meant"), [("RSAFE_TRESHOLD", "RSAFE_THRESHOLD"), ("RSAFE_HOME", "")])
def test_a_variable_that_is_misspelt_is_said_once(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "0.1")
    for _ in range(2):
        guard()
    said = [record.getMessage() for record in caplog.records if variable in record.getMessage()]
    assert said == ([f"The environment has {variable}, which sets nothing; {meant} would."] if meant else [])
