"""From a rail config to its guard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemoguardrails import LLMRails, RailsConfig

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard import Guard, GuardSettings
from rsafe_plugins.nemo.actions import RailActions

KEY = "rsafe"


def guard_from_config(config: RailsConfig) -> Guard:
    """The guard that a rail config describes.

    Args:
        config: Its `custom_data["rsafe"]` holds `GuardSettings` by name; in a config made in Python also a
            `Guard`. Without it the guard has the default settings. Relative paths of a policy, a template, a
            dialect or thresholds are looked up in the config's folder, then in the working directory.

    Raises:
        SettingsError: A setting is unknown or can't be used; the message names it.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """
    given = config.custom_data.get(KEY)
    if isinstance(given, Guard):
        return given
    if not isinstance(given, Mapping | None):
        raise SettingsError(f"custom_data.{KEY} must be a mapping of settings, not {type(given).__name__}.")
    values = {str(name): value for name, value in (given or {}).items()}
    for name in ("policy", "template", "threshold", "dialect"):
        if isinstance(value := values.get(name), str) and config.config_path:
            beside = Path(config.config_path) / value
            values[name] = beside if beside.is_file() else value
    return Guard.from_settings(GuardSettings.read(values, source=f"custom_data.{KEY}"))


def register(app: LLMRails) -> None:
    """Gives a rails app the actions behind the rails, with a guard made from the app's config.

    NeMo has this called for every app whose config imports `rsafe_plugins/rails`. Called again, it replaces
    the guard by one with the config's present settings.

    Raises:
        SettingsError: A setting is unknown or can't be used; the message names it.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """
    actions = RailActions(guard_from_config(app.config))
    app.register_action(actions.rsafe_check_input)
    app.register_action(actions.rsafe_check_output)
