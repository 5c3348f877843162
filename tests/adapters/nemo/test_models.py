"""The guard's engine as a model of the type `rsafe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nemoguardrails import LLMRails, RailsConfig
from support.nemo import MainModel

from rsafe_plugins.backends import LlamaCppBackend, OpenAIBackend, TransformersBackend
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.nemo import guard_from_config
from rsafe_plugins.testing import ScriptedBackend

URL = "http://127.0.0.1:9/v1"


def config(model: str, rsafe: dict[str, Any] | None = None) -> RailsConfig:
    made = RailsConfig.from_content(
        yaml_content=f"models:\n  - {{type: rsafe, {model}}}\n"
        "import_paths: [rsafe_plugins/rails]\nrails: {input: {flows: [rsafe check input]}}\n"
    )
    made.custom_data["rsafe"] = rsafe or {}
    return made


@pytest.mark.parametrize("engine", ["openai", "nim", "vllm_openai", "ollama"])
def test_a_server_is_asked_by_our_own_client(engine: str) -> None:
    guard = guard_from_config(config(f"engine: {engine}, model: a-guard, parameters: {{base_url: '{URL}'}}"))
    assert isinstance(guard.backend, OpenAIBackend)
    assert guard.backend.model == "a-guard"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("engine: embedded, model: guard", LlamaCppBackend),
        ("engine: transformers, model: some/guard", TransformersBackend),
    ],
)
def test_an_engine_may_be_in_this_process(model: str, kind: type) -> None:
    assert isinstance(guard_from_config(config(model)).backend, kind)


def test_the_key_is_read_from_the_variable_that_the_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_KEY", "secret")
    made = config(f"engine: openai, model: g, api_key_env_var: GUARD_KEY, parameters: {{base_url: '{URL}'}}")
    assert "secret" not in repr(vars(guard_from_config(made).backend))


def test_an_app_is_built_with_it_and_can_be_built_again() -> None:
    made = config(
        f"engine: openai, model: a-guard, parameters: {{base_url: '{URL}'}}", {"policy": "mlcommons"}
    )
    for _ in range(2):
        rails = LLMRails(made, llm=MainModel())
        guard = guard_from_config(rails.config)
        assert (guard.backend.model, guard.policy.name) == ("a-guard", "mlcommons")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("engine: magic, model: g", r"models\[type=rsafe\]\.engine must be one of .*, not 'magic'"),
        ("engine: vllm_openai, model: g", r"models\[type=rsafe\]\.parameters\.base_url must say"),
        ("engine: openai, model: g, parameters: {base_url: 'ftp://x'}", r"models\[type=rsafe\]: "),
        ("engine: openai, model: g, parameters: {base_url: 'http://x', temperature: 1}", "not temperature"),
        (
            "engine: openai, model: g, parameters: {base_url: 'http://x', timeout: -1}",
            r"models\[type=rsafe\]: timeout",
        ),
    ],
)
def test_what_cannot_be_used_is_named(model: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        guard_from_config(config(model))


@pytest.mark.parametrize("more", ["parameters: {n_ctx: 512}", "api_key_env_var: HOME"])
@pytest.mark.parametrize("engine", ["embedded", "llamacpp", "transformers", "vllm"])
def test_an_engine_in_this_process_ignores_no_parameter(engine: str, more: str) -> None:
    with pytest.raises(
        SettingsError, match=f"no parameters and no api_key_env_var where the engine is {engine}"
    ):
        guard_from_config(config(f"engine: {engine}, model: g, {more}"))


def test_of_two_guard_models_none_is_ignored() -> None:
    made = config("engine: embedded, model: guard")
    made.models = made.models * 2
    with pytest.raises(SettingsError, match="one model of the type rsafe, and it has 2"):
        guard_from_config(made)


def test_the_engine_is_named_once() -> None:
    made = config("engine: embedded, model: guard", {"backend": ScriptedBackend("")})
    with pytest.raises(SettingsError, match="must be named once"):
        guard_from_config(made)


def test_a_setting_that_is_not_there_is_named_when_the_app_is_built() -> None:
    made = config("engine: magic, model: g")
    with pytest.raises(RuntimeError) as raised:
        LLMRails(made, llm=MainModel())
    assert isinstance(raised.value.__cause__, SettingsError)


def beside(folder: Path, model: str, rsafe: dict[str, Any] | None = None, kind: str = "rsafe") -> RailsConfig:
    """The same config in a folder of its own, which isn't the working directory."""
    made = config(model, rsafe)
    made.models[0].type = kind
    made.config_path = str(folder)
    return made


@pytest.mark.parametrize("adapter", ["", "#adapter.gguf"])
def test_an_engines_files_are_looked_up_beside_the_config(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("guard.gguf", "adapter.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    named = f"guard.gguf{adapter}"
    by_model = guard_from_config(beside(tmp_path, f"engine: llamacpp, model: '{named}'")).backend
    by_key = guard_from_config(
        beside(tmp_path, "engine: openai, model: main", {"backend": f"llamacpp:{named}"}, kind="main")
    ).backend
    for backend in (by_model, by_key):
        assert isinstance(backend, LlamaCppBackend)
        assert backend._model == tmp_path / "guard.gguf"
        assert backend._adapter == (tmp_path / "adapter.gguf" if adapter else None)


def test_an_engines_file_that_is_not_there_stops_the_app(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"names the file nowhere\.gguf"):
        guard_from_config(beside(tmp_path, "engine: llamacpp, model: nowhere.gguf"))


def test_a_server_that_nobody_has_named_gets_the_key_of_its_own_provider(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another provider")
    monkeypatch.delenv("RSAFE_API_KEY", raising=False)
    monkeypatch.delenv("NVIDIA_API_KEY", raising=False)
    with pytest.raises(SettingsError, match="NVIDIA_API_KEY"):
        guard_from_config(config("engine: nim, model: a-guard"))
    monkeypatch.setenv("NVIDIA_API_KEY", "its own")
    backend = guard_from_config(config("engine: nim, model: a-guard")).backend
    assert isinstance(backend, OpenAIBackend)
    assert backend._key_variables == ("NVIDIA_API_KEY",)


def test_several_addresses_are_a_pool() -> None:
    backend = guard_from_config(
        config("engine: openai, model: g, parameters: {base_url: 'http://a:1/v1,http://b:1/v1'}")
    ).backend
    assert isinstance(backend, OpenAIBackend)
    assert backend._urls == ["http://a:1/v1", "http://b:1/v1"]


@pytest.mark.parametrize("wrong", ["timeout: '30'", "concurrency: '8'", "queue: true"])
def test_a_parameter_that_is_no_number_is_named(wrong: str) -> None:
    name = wrong.partition(":")[0]
    with pytest.raises(SettingsError, match=rf"parameters\.{name} must be a number"):
        guard_from_config(config(f"engine: openai, model: g, parameters: {{base_url: '{URL}', {wrong}}}"))
