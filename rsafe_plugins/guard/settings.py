"""One set of settings everywhere: `Guard(...)`'s arguments, the environment, `rsafe.yaml`, and the adapters."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from rsafe_plugins.backends import Backend
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard.fitted import Band, CategoryThreshold, NotBool, Probability
from rsafe_plugins.policy import Policy

Reasoning = Literal["never", "always", "adaptive"]
OnError = Literal["block", "allow", "raise"]

log = logging.getLogger(__name__)

_FILE = "rsafe.yaml"
_PREFIX = "RSAFE_"


class GuardSettings(BaseSettings):
    """A guard's settings.

    What is not given comes from `RSAFE_<NAME>` in the environment, then from `rsafe.yaml` in the working
    directory, then from the defaults.

    Attributes:
        policy: A `Policy`, a built-in policy's name, or a policy file's path.
        backend: A backend object or string.
        reasoning: `always`: think, then the verdict. `never`: the verdict's probability from one forward pass.
            `adaptive`: never first, and think where that probability lies inside the band.
        threshold: Unsafe from this probability on, 0 to 1; or a file that `rsafe eval --fit` wrote, which has
            one for each model and policy, with its band. None for those that come with this package: the
            embedded guard's, and 0.5 with a band of 0.3 to 0.7 for other models.
        band: Lowest and highest probability at which adaptive reasoning thinks. None for the one that was fitted
            for the model, also beside a `threshold` of your own.
        category_threshold: What is found unsafe without a thought, prompt or response, is then asked about category by
            category, of the policy and of those of `rsafe-18` that it leaves out, and is safe if one of the policy
            fits better with less than this probability; 0 doesn't ask. None for what was fitted for the model, as
            with `threshold`, also beside a `threshold` of your own. For guards that were trained so, on engines that
            give probabilities; with `reasoning: always` nothing is asked, nor where the policy has all of `rsafe-18` or
            a category that isn't recognized.
        max_reasoning_tokens: Budget of the thought, in tokens; it is closed there and the verdict scored.
        timeout: Seconds for one check. A batch has that much for each round of checks that the engine works on
            at once.
        on_error: What a failed check does: `block`, `allow`, or `raise`.
        cache: Seconds for which a verdict is kept for the same content, at most 10,000 of them; 0 keeps none.
            The same content checked twice at once is judged once either way.
        name_categories: Whether what is blocked without a thought is asked about once more, to name its categories: in
            one request, or in a short one for each category where the model was fitted for that. Without it such
            verdicts name none, and what is blocked costs no more than what passes, unless it is compared.
        policy_tokens: What the policy may take of the prompt, about, in tokens. A longer one loses as many of its
            examples as that takes, which is logged; nothing else of it is ever cut.
        dialect: How the guard model is asked and answers: a name such as `llama-guard`, or a dialect file's path.
            None guesses from the model's name.
        template: A prompt template file; None for the dialect's own.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, yaml_file=_FILE, extra="forbid", frozen=True, arbitrary_types_allowed=True
    )

    policy: Policy | str | Path = "rsafe-18"
    backend: Backend | str = "embedded"
    reasoning: Reasoning = "adaptive"
    threshold: Probability | Path | None = None
    band: Band | None = None
    category_threshold: CategoryThreshold | None = None
    max_reasoning_tokens: Annotated[int, NotBool] = Field(default=256, ge=1)
    timeout: Annotated[float, NotBool] = Field(default=60.0, gt=0)
    on_error: OnError = "block"
    cache: Annotated[float, NotBool] = Field(default=0.0, ge=0)
    name_categories: bool = True
    policy_tokens: Annotated[int, NotBool] = Field(default=2000, ge=100)
    dialect: str | Path | None = None
    template: Path | None = None

    @field_validator("threshold")
    @classmethod
    def _there(cls, value: float | Path | None) -> float | Path | None:
        if isinstance(value, Path) and not value.is_file():
            raise ValueError("must be a number from 0 to 1, or a file that `rsafe eval --fit` wrote")
        return value

    @field_validator("timeout", "cache")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("must be a finite number of seconds")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments before the environment before the file."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    @classmethod
    def read(cls, given: Mapping[str, Any], source: str = "Guard") -> GuardSettings:
        """Settings from what was given (None means not given) and the other sources.

        Args:
            given: Values by name.
            source: What the values come from, for messages.

        Raises:
            SettingsError: A key is unknown or a value can't be used; the message names it.
        """
        if strange := [name for name in given if not isinstance(name, str)]:
            raise SettingsError(f"{source}: a setting's name is text, not {strange[0]!r}.")
        if Path(_FILE).is_dir():  # as container engines make where a file that is to be mounted isn't there
            raise SettingsError(
                f"{_FILE} is a directory, and must be a file of settings: replace or remove it."
            )
        _say_what_is_misspelt(tuple(name for name in os.environ if name.upper().startswith(_PREFIX)))
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            raise SettingsError(_sentence(error, source)) from error
        except (yaml.YAMLError, OSError, ValueError) as error:
            raise SettingsError(f"{_FILE} can't be read as a mapping of settings: {error}") from error
        except (AttributeError, TypeError, RecursionError) as error:
            raise SettingsError(
                f"{_FILE} can't be read as a mapping of settings, such as 'policy: rsafe-18'."
            ) from error


@cache  # once for the same variables
def _say_what_is_misspelt(variables: tuple[str, ...]) -> None:
    known = [f"{_PREFIX}{name.upper()}" for name in GuardSettings.model_fields]
    for variable in variables:
        near = difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.9)
        if near and near[0] != variable.upper():
            log.warning("The environment has %s, which sets nothing; %s would.", variable, near[0])


def _sentence(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        known = ", ".join(GuardSettings.model_fields)
        return f"{source}: there is no setting {name!r}; the settings are {known}."
    value = str(first["input"]) if isinstance(first["input"], Path) else first["input"]
    shown = (
        repr(value) if isinstance(value, str | int | float | bool | list | tuple) else type(value).__name__
    )
    return f"{source}: the setting {name!r} can't be {shown}: {first['msg'].removeprefix('Value error, ')}."
