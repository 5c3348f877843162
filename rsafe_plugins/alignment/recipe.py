"""Recipes: how a stage trains, as a YAML file. Some come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.policy import ContentKind

# What a stage writes into its folder to go on from, and removes once all is written.
CHECKPOINTS = {"warm-start": "checkpoint.pt", "grpo": "checkpoints/checkpoint-*"}

_PACKAGED = resources.files("rsafe_plugins.alignment").joinpath("recipes")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PolicyMix(_Settings):
    """How the policy of each item is drawn; see `policy_variant`.

    Attributes:
        whole: Share of policies that are `rsafe-18` as it stands, 0 to 1.
        names: Share of those that hold its ids and names alone, 0 to 1.
        reworded: Share of those that keep every category but change order, ids and words, 0 to 1. What remains of 1
            keeps three to nine categories so changed.
        user_words: Share of changed policies that are put as the owner of an application would, 0 to 1.
        distractors: Share of changed policies with categories that no item meets, 0 to 1.
    """

    whole: float = Field(default=1.0, ge=0, le=1)
    names: float = Field(default=0.0, ge=0, le=1)
    reworded: float = Field(default=0.0, ge=0, le=1)
    user_words: float = Field(default=0.0, ge=0, le=1)
    distractors: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.whole + self.names + self.reworded > 1 + 1e-9:
            raise ValueError(
                "whole, names and reworded are shares of one whole and must not exceed 1 together"
            )
        return self


class Distillation(_Settings):
    """How far training keeps what the adapter that it goes on from answers, as in learning without forgetting.

    What is taught is a mixture of the label and of what that adapter predicts in its place; the hard choice between
    categories is taught by labels alone. See Li and Hoiem, arXiv 1606.09282.

    Attributes:
        prompts: Share of that adapter's prediction where a prompt is judged, 0 to 1.
        responses: Where a response is.
        documents: Where a document is.
    """

    prompts: float = Field(default=0.0, ge=0, le=1)
    responses: float = Field(default=0.0, ge=0, le=1)
    documents: float = Field(default=0.0, ge=0, le=1)

    def share(self, kind: ContentKind) -> float:
        """The share for contents of a kind; tools' calls and results, which aren't trained on, have none."""
        return {"prompt": self.prompts, "response": self.responses, "document": self.documents}.get(kind, 0.0)

    @property
    def any(self) -> bool:
        """Whether anything is kept."""
        return bool(self.prompts or self.responses or self.documents)


class StageSettings(_Settings):
    """What every stage can be told.

    Attributes:
        base: A GGUF file, or a Hugging Face folder or name; None for the embedded model.
        rank: Rank of the LoRA; its alpha is twice that.
        first_layer: The LoRA begins at this decoder layer, counted from 0; those below stay as they are, and
            nothing is computed backwards through them.
        minutes: Training ends after so many minutes at the latest; None for no limit.
        seed: Of all that is drawn.
    """

    base: str | None = None
    rank: int = Field(default=16, ge=1)
    first_layer: int = Field(default=0, ge=0)
    minutes: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)


class WarmStartSettings(StageSettings):
    """How the warm start trains.

    Attributes:
        learning_rate: Peak of a linear decay, which reaches zero with the last item or after `minutes`.
        warmup_steps: Steps of linear warm-up before it.
        batch: Examples a step, which share a policy.
        items: Items to train on at most, in the order in which they are drawn; None for all.
        micro_batch: Examples computed at once; only memory and speed depend on it.
        max_prompt_tokens: A prompt or document is cut after so many tokens, in training only.
        max_response_tokens: A response likewise; the prompt before it is cut at half as many.
        prompts_as_documents: So many harmless prompts of at most 40 words are also judged as documents, in which there
            is no injected instruction; fewer if the data has fewer. What is held out has them too.
        injected_documents: So many documents are made of the data's, at most six of each unsafe one: half of them hide
            it among harmless prompts, the other half have a harmless prompt in its place. What is held out has such
            documents too.
        crossed_responses: So many responses are made of the data's, two at most of each unsafe one: half of them are
            unsafe responses after harmless prompts, the other half harmless texts after unsafe prompts. What is held
            out has such responses too.
        policies: How the policy of each batch is drawn.
        thoughts: Share of examples that teach a thought beside the bare verdict, 0 to 1.
        category_weight: Weight of the categories that follow a bare verdict; the verdict's is 1.
        thought_weight: Weight of the thought with its verdict.
        through_policy: Whether the gradient runs through the shared part too. Without it the adapter still changes
            what is computed there, but nothing is learned from that, and a step is about a third faster.
        by_category: Share of steps that ask for each category by itself, as the dialect `rsafe-by-category` does, 0 to
            1; policies, thoughts and their weights play no part in them. Below 1 they only teach which category an
            unsafe item meets, since the other steps teach what is unsafe.
        distill: How far verdicts stay those of the adapter that training goes on from, which needs one. Training is
            slower by about a third with it.
        dtype: What is computed in; the adapter itself stays in float32. `bfloat16` is faster on GPUs, and on processors
            with instructions for it.
    """

    learning_rate: float = Field(default=4e-4, gt=0)
    warmup_steps: int = Field(default=10, ge=1)
    batch: int = Field(default=24, ge=1)
    items: int | None = Field(default=None, ge=1)
    micro_batch: int = Field(default=4, ge=1)
    max_prompt_tokens: int = Field(default=128, ge=8)
    max_response_tokens: int = Field(default=96, ge=8)
    prompts_as_documents: int = Field(default=0, ge=0)
    injected_documents: int = Field(default=0, ge=0)
    crossed_responses: int = Field(default=0, ge=0)
    policies: PolicyMix = PolicyMix(whole=0.5, names=0.3, reworded=0.1)
    thoughts: float = Field(default=0.2, ge=0, le=1)
    category_weight: float = Field(default=0.1, ge=0)
    thought_weight: float = Field(default=0.4, ge=0)
    through_policy: bool = True
    by_category: float = Field(default=0.0, ge=0, le=1)
    distill: Distillation = Distillation()
    dtype: Literal["float32", "bfloat16"] = "float32"


class GRPOSettings(StageSettings):
    """How GRPO trains. The defaults are the paper's (arXiv 2506.07736), where it names a value.

    Attributes:
        full: Whether all weights are trained; otherwise a LoRA is.
        learning_rate: Held after a linear warm-up.
        warmup_steps: Steps of that.
        epochs: Passes over the items.
        steps: Optimizer steps; None for what the passes come to.
        batch: Prompts a step.
        group_size: Completions a prompt, whose rewards are compared with each other.
        micro_batch: Completions that a process computes gradients for at once; only memory and speed depend on it. In
            one process and without `gradient_checkpointing`, the completions of a prompt that are together in one share
            what is computed of the prompt.
        max_tokens: Tokens that a completion may have; one that is cut off there, before its box ends, has no verdict.
        temperature: Of the sampled completions.
        top_p: The smallest set of tokens with this probability is sampled from, above 0 to 1.
        repetition_penalty: 1 for none.
        rollouts: What samples the completions, `transformers` or `vllm`.
        vllm_memory: Share of a GPU's memory that vLLM may take beside the training, 0 to 1.
        gradient_checkpointing: Whether activations are computed twice, which saves memory.
        through_prompt: Whether the gradient runs through what is computed of a prompt, too. Without it the adapter
            still changes that, but nothing is learned from it, and a step takes about a third less time. True is what
            several processes and `gradient_checkpointing` do in any case.
        dtype: What the loss is computed in, `float32` or `bfloat16`, which is faster on GPUs and on processors with
            instructions for it; None for `bfloat16` on a GPU and `float32` elsewhere. What is trained stays in float32.
        kl: Weight of the divergence from the model that training began with; 0 saves computing it.
        scale: What the advantages are divided by: the standard deviation of rewards in their `group`, or in the
            whole `batch`.
        accuracy_weight: Weight of the right label in the right form.
        format_weight: Weight of the right form.
        length_weight: Weight of leaving tokens unused in a right answer.
        adherence_weight: Weight of being right under both policies of a pair; above 0, unsafe items of known
            category are judged as such pairs.
        skip_solved: Whether an item whose completions were all right sits out the next pass.
        policies: How the policy of each item is drawn.
        max_prompt_tokens: A prompt or document is cut after so many tokens.
        max_response_tokens: A response likewise; the prompt before it is cut at half as many.
        evaluate_every: Steps between evaluations on held-out items.
        evaluate_items: Held-out items that are judged each time; 0 for no evaluation.
        save_every: Steps between checkpoints.
        collapse_window: Training stops if so many steps in a row bring no verdict, or one label only.
    """

    full: bool = False
    learning_rate: float = Field(default=1e-7, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    epochs: int = Field(default=3, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch: int = Field(default=32, ge=1)
    group_size: int = Field(default=4, ge=2)
    micro_batch: int = Field(default=4, ge=1)
    max_tokens: int = Field(default=512, ge=8)
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=0.8, gt=0, le=1)
    repetition_penalty: float = Field(default=1.05, ge=1)
    rollouts: Literal["transformers", "vllm"] = "transformers"
    vllm_memory: float = Field(default=0.3, gt=0, lt=1)
    gradient_checkpointing: bool = True
    through_prompt: bool = True
    dtype: Literal["float32", "bfloat16"] | None = None
    kl: float = Field(default=0.001, ge=0)
    scale: Literal["group", "batch"] = "group"
    accuracy_weight: float = Field(default=0.9, ge=0)
    format_weight: float = Field(default=0.1, ge=0)
    length_weight: float = Field(default=0.0, ge=0)
    adherence_weight: float = Field(default=0.0, ge=0)
    skip_solved: bool = False
    policies: PolicyMix = PolicyMix()
    max_prompt_tokens: int = Field(default=1024, ge=8)
    max_response_tokens: int = Field(default=1024, ge=8)
    evaluate_every: int = Field(default=25, ge=1)
    evaluate_items: int = Field(default=100, ge=0)
    save_every: int = Field(default=25, ge=1)
    collapse_window: int = Field(default=20, ge=2)

    @model_validator(mode="after")
    def _terms_can_work(self) -> Self:
        if self.adherence_weight and self.scale == "group":
            raise ValueError(
                "adherence_weight needs scale: batch, since what a whole group gains is lost when its rewards are "
                "divided by their own spread"
            )
        if self.adherence_weight and self.batch % 2:
            raise ValueError(f"adherence_weight needs an even batch, for pairs, and batch is {self.batch}")
        return self


_Stage = TypeVar("_Stage", bound=StageSettings)
_FOLDERS: dict[type[StageSettings], str] = {WarmStartSettings: "warm-start", GRPOSettings: "grpo"}


def recipe_names(stage: type[StageSettings]) -> tuple[str, ...]:
    """The recipes of a stage that come with the package."""
    return tuple(sorted(Path(file.name).stem for file in _PACKAGED.joinpath(_FOLDERS[stage]).iterdir()))


def load_recipe(stage: type[_Stage], recipe: str | Path | None, options: Mapping[str, Any]) -> _Stage:
    """A recipe, and what is to be different from it.

    Args:
        stage: What it sets.
        recipe: One of `recipe_names(stage)`, or a YAML file; None for the defaults.
        options: Settings that win over the recipe's. A name may reach into `policies`, as in `policies.whole`; its
            other parts stay as they are.

    Raises:
        SettingsError: There is no such recipe, or it or an option can't be used.
    """
    values = _read(stage, recipe) if recipe is not None else {}
    source = f"The recipe {recipe}" if recipe is not None else "The settings"
    defaults = stage().model_dump()
    for name, value in options.items():
        head, dot, tail = name.partition(".")
        if not dot:
            values[head] = value
        elif isinstance(part := values.setdefault(head, defaults.get(head, {})), dict):
            part[tail] = value
        else:
            raise SettingsError(f"There is no setting {name}: {head} has no parts.")
    try:
        return stage.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            parts: dict[str, type[BaseModel]] = {"policies": PolicyMix, "distill": Distillation}
            part = parts.get(where.split(".")[0], stage) if "." in where else stage
            raise SettingsError(
                f"{source} has the setting {where}, which there is not; expected one of "
                f"{', '.join(part.model_fields)}."
            ) from error
        said = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{source} can't be used: {where + ': ' if where else ''}{said}.") from error


def _read(stage: type[StageSettings], recipe: str | Path) -> dict[str, Any]:
    try:
        if str(recipe) in recipe_names(stage):
            text = _PACKAGED.joinpath(_FOLDERS[stage], f"{recipe}.yaml").read_text("utf-8")
        else:
            text = Path(recipe).read_text("utf-8")
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise SettingsError(
            f"Expected a recipe's file or one of {', '.join(recipe_names(stage))}, and there is no {recipe}."
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"The recipe {recipe} can't be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"The recipe {recipe} must hold settings, as in 'batch: 32'.")
    return values
