"""From a rail config to its guards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.rails.llm.config import Model

from rsafe_plugins.backends import Backend, OpenAIBackend, shared_backend, with_files
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard import Guard, GuardSettings
from rsafe_plugins.nemo.actions import RailActions
from rsafe_plugins.nemo.guards import RAILS, Rail, RailGuards
from rsafe_plugins.nemo.knowledge import watch_knowledge_base
from rsafe_plugins.nemo.refusal import refuse_in_streams
from rsafe_plugins.policy import Policy

KEY = "rsafe"
POLICIES = "policies"
MODEL_TYPE = "rsafe"

# Engines of a `models:` entry that speak OpenAI's chat API, and where they are when no `base_url` says so.
_SERVERS = {
    "openai": "https://api.openai.com/v1",
    "nim": "https://integrate.api.nvidia.com/v1",
    "vllm_openai": None,
    "ollama": "http://localhost:11434/v1",
}
_KEYS = {"nim": "NVIDIA_API_KEY"}
_IN_PROCESS = ("llamacpp", "transformers", "vllm")
_CLIENT_SETTINGS = ("timeout", "connect_timeout", "concurrency", "queue")


def guard_from_config(config: RailsConfig) -> Guard:
    """The guard that a rail config describes.

    Args:
        config: Its `custom_data["rsafe"]` holds `GuardSettings` by name; in a config made in Python also a
            `Guard`. Without it the guard has the default settings. Relative paths of a policy, a template, a
            dialect, thresholds or an engine's files are looked up in the config's folder, then in the working
            directory. A model of the type `rsafe` under `models` is the guard's engine where the settings name none.

    Raises:
        SettingsError: A setting is unknown or can't be used; the message names it.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """
    _check_spelling(config)
    given = config.custom_data.get(KEY)
    if isinstance(given, Guard):
        return given
    values = {name: value for name, value in _settings(config).items() if name != POLICIES}
    for name in ("policy", "template", "threshold", "dialect"):
        if isinstance(value := values.get(name), str):
            values[name] = _beside(config.config_path, value)
    if isinstance(engine := values.get("backend"), str):
        values["backend"] = _engine_beside(config.config_path, engine, f"custom_data.{KEY}.backend")
    models = [model for model in config.models if model.type == MODEL_TYPE]
    if len(models) > 1:
        raise SettingsError(
            f"The config must have one model of the type {MODEL_TYPE}, and it has {len(models)}."
        )
    if models:
        if values.get("backend") is not None:
            raise SettingsError(
                f"The guard's engine must be named once: by custom_data.{KEY}.backend, or by the model of the "
                f"type {MODEL_TYPE}."
            )
        values["backend"] = backend_from_model(models[0], config.config_path)
    return Guard.from_settings(GuardSettings.read(values, source=f"custom_data.{KEY}"))


def guards_from_config(config: RailsConfig) -> RailGuards:
    """The guard of each rail that a rail config describes.

    Args:
        config: As `guard_from_config` takes it. `custom_data["rsafe"]["policies"]` may hold a policy for each
            rail: `input`, `output`, `retrieval`, `tool_call`, `tool_result`.

    Raises:
        SettingsError: A setting is unknown or can't be used, or a rail can't be told its policy.
        PolicyError: A policy can't be found or read.
        TemplateError: The template can't be found or read.
    """
    policies = _settings(config).get(POLICIES)
    where = f"custom_data.{KEY}.{POLICIES}"
    if not isinstance(policies, Mapping | None):
        raise SettingsError(f"{where} must be a mapping of rails to policies, not {type(policies).__name__}.")
    of_rails: dict[Rail, Policy | str | Path] = {}
    for name, policy in (policies or {}).items():
        if name not in RAILS:
            raise SettingsError(f"{where} must name rails ({', '.join(RAILS)}), not {name!r}.")
        if not isinstance(policy, Policy | str | Path):
            raise SettingsError(f"{where}.{name} must be a policy's name or path, not {policy!r}.")
        of_rails[name] = policy

    folder = config.config_path  # the guards may outlive the config

    def find(name: str | Path) -> Policy:
        return Policy.load(_beside(folder, str(name)))

    guards = RailGuards(guard_from_config(config), of_rails, find)
    guards.check(config)
    return guards


def backend_from_model(model: Model, folder: str | None = None) -> Backend:
    """The engine that an entry of `models:` names.

    Args:
        model: Its `engine` is one of OpenAI's chat API (`openai`, `nim`, `vllm_openai`, `ollama`), with
            `parameters.base_url` and `api_key_env_var`, or one in this process (`llamacpp`, `transformers`,
            `vllm`) or `embedded`.
        folder: Where a file that it names is looked up first.

    Raises:
        SettingsError: Something in it can't be used; the message names the key.
    """
    where = f"models[type={MODEL_TYPE}]"
    parameters = dict(model.parameters)
    if model.engine in (*_IN_PROCESS, "embedded") and (parameters or model.api_key_env_var):
        raise SettingsError(
            f"{where} must have no parameters and no api_key_env_var where the engine is {model.engine}, which takes "
            f"none: set custom_data.{KEY}.backend in Python instead."
        )
    if model.engine == "embedded":
        return shared_backend("embedded")
    if model.engine in _IN_PROCESS:
        if not model.model:
            raise SettingsError(
                f"{where}.model must name the model that {model.engine} runs, and it is empty."
            )
        named = f"{model.engine}:{model.model}"
        return shared_backend(_engine_beside(folder, named, f"{where}.model"))
    if model.engine not in _SERVERS:
        engines = ", ".join((*_SERVERS, *_IN_PROCESS, "embedded"))
        raise SettingsError(f"{where}.engine must be one of {engines}, not {model.engine!r}.")
    given = parameters.pop("base_url", None)
    url = given or _SERVERS[model.engine]
    if url is None:
        raise SettingsError(f"{where}.parameters.base_url must say where the server is, and it is missing.")
    if unknown := sorted(set(parameters) - set(_CLIENT_SETTINGS)):
        raise SettingsError(
            f"{where}.parameters must hold base_url, {', '.join(_CLIENT_SETTINGS)} only, not {', '.join(unknown)}."
        )
    for name, number in parameters.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise SettingsError(f"{where}.parameters.{name} must be a number, not {number!r}.")
    # Nobody has named the server, so it gets no other provider's key.
    key = model.api_key_env_var or (None if given else _KEYS.get(model.engine))
    try:
        return OpenAIBackend(str(url).split(","), model.model, api_key_env=key, **parameters)
    except (SettingsError, TypeError) as error:
        raise SettingsError(f"{where}: {error}") from error


def _check_spelling(config: RailsConfig) -> None:
    """Refuses a key or a model's type that would be ignored, with all that stands under it."""
    for name in (*config.custom_data, *(model.type for model in config.models)):
        if str(name) != KEY and str(name).casefold() == KEY:
            raise SettingsError(
                f"The key in custom_data, and the type of the guard's model, is {KEY!r}, not {name!r}."
            )


def _settings(config: RailsConfig) -> Mapping[str, Any]:
    """What the config says of the guard by name; nothing where it holds a guard."""
    given = config.custom_data.get(KEY)
    if given is None or isinstance(given, Guard):
        return {}
    if not isinstance(given, Mapping):
        raise SettingsError(f"custom_data.{KEY} must be a mapping of settings, not {type(given).__name__}.")
    return {str(name): value for name, value in given.items()}


def _beside(folder: str | None, name: str) -> str | Path:
    """The file of that name in the config's folder, or in one of those that were joined; without one, the name."""
    beside = (Path(part) / name for part in (folder or "").split(",") if part)
    return next((path for path in beside if path.exists()), name)


def _engine_beside(folder: str | None, text: str, where: str) -> str:
    """A backend string with the files that it names.

    Raises:
        SettingsError: A GGUF file that it names isn't there.
    """
    found, files = with_files(text, lambda name: str(_beside(folder, name)))
    if missing := [file for file in files if not Path(file).expanduser().is_file()]:
        raise SettingsError(
            f"{where} names the file {missing[0]}, which is neither beside the config nor in the working directory."
        )
    return found


def register(app: LLMRails) -> None:
    """Gives a rails app the actions behind the rails, with a guard made from the app's config.

    The app's streams then end with its refusal where our output rail blocks, unless the config has
    `enable_rails_exceptions`.

    NeMo has this called for every app whose config imports `rsafe_plugins/rails`. Called again, it replaces
    the guard by one with the config's present settings.

    Raises:
        SettingsError: A setting is unknown or can't be used; the message names it.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """
    actions = RailActions(guards_from_config(app.config))
    _take_model(app, actions.guard)
    for action in (
        actions.rsafe_check_input,
        actions.rsafe_check_output,
        actions.rsafe_check_retrieval,
        actions.rsafe_check_tool_call,
        actions.rsafe_check_tool_result,
    ):
        app.register_action(action)
    watch_knowledge_base(app, actions.passed_chunks)
    refuse_in_streams(app)


def _take_model(app: LLMRails, guard: Guard) -> None:
    """Takes the guard's model out of those for which NeMo makes clients of its own."""
    config = app.config
    others = [model for model in config.models if model.type != MODEL_TYPE]
    if len(others) == len(config.models):
        return
    config.models = others
    if not isinstance(config.custom_data.get(KEY), Guard):
        config.custom_data = {**config.custom_data, KEY: {**_settings(config), "backend": guard.backend}}
