"""Thresholds and bands that `rsafe eval --fit` fitted from labelled data, a model and a policy each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.policy import Policy


def _refuse_bool(value: Any) -> Any:
    """Refuses `true` and YAML's `yes`, which would be taken for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


NotBool = BeforeValidator(_refuse_bool)
Probability = Annotated[float, Field(ge=0.0, le=1.0), NotBool]
# At 1 nothing would fit well enough, and everything would be let through.
CategoryThreshold = Annotated[float, Field(ge=0.0, lt=1.0), NotBool]

PACKAGED = Path(__file__).parent / "data" / "fitted.yaml"


def _ordered(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] > band[1]:
        raise ValueError("must be [lowest, highest]")
    return band


Band = Annotated[tuple[Probability, Probability], AfterValidator(_ordered)]


class OperatingPoint(BaseModel):
    """Where a guard draws its lines.

    Attributes:
        threshold: Unsafe from this probability on, 0 to 1.
        band: Lowest and highest probability at which adaptive reasoning thinks.
        category_threshold: What is found unsafe is safe if a category of the policy fits it better than those that the
            policy leaves out with less than this probability; 0 where they aren't compared.
        digest: The policy's digest when this was fitted; empty where it wasn't.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Probability = 0.5
    band: Band = (0.3, 0.7)
    category_threshold: CategoryThreshold = 0.0
    digest: str = ""


_File = TypeAdapter(dict[str, dict[str, OperatingPoint]])


def operating_point(model: str, policy: Policy, file: Path | None = None) -> OperatingPoint:
    """What was fitted for a model under a policy.

    Where that policy wasn't fitted, or was changed since, the model's first one stands in: a model's
    probabilities lie about alike under any policy. A model that wasn't fitted at all has the defaults.

    Args:
        model: The model's name, as in verdicts.
        policy: The policy.
        file: What `rsafe eval --fit` wrote. None for what comes with this package.

    Raises:
        SettingsError: The file can't be read, or isn't of that form.
    """
    points = read(file or PACKAGED).get(model, {})
    for point in points.values():
        if point.digest == policy.digest:
            return point
    return next(iter(points.values()), OperatingPoint())


@cache
def read(file: Path) -> dict[str, dict[str, OperatingPoint]]:
    """The operating points in a file, by model and policy name.

    Raises:
        SettingsError: The file can't be read, or isn't of that form.
    """
    try:
        return _File.validate_python(yaml.safe_load(file.read_text("utf-8")) or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{file}: {where or 'it'} can't be used: {first['msg']}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"The thresholds in {file} can't be read ({type(error).__name__}): expected what "
            "`rsafe eval --fit` writes."
        ) from error


def write(file: Path, model: str, points: dict[str, OperatingPoint]) -> None:
    """Puts a model's operating points, by policy name, into a file; those of other models and policies stay.

    Raises:
        SettingsError: The file is there and isn't of that form, or can't be written; what was in it stays.
    """
    stored: dict[str, Any] = {}
    if file.exists():
        read.cache_clear()
        stored = _File.dump_python(read(file), mode="json")
    fresh = {name: point.model_dump(mode="json") for name, point in points.items()}
    stored[model] = {**stored.get(model, {}), **fresh}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(yaml.safe_dump(stored, sort_keys=False), "utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SettingsError(f"{file} can't be written ({error.strerror}): choose another place.") from error
    read.cache_clear()
