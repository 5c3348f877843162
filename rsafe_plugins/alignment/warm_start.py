"""Stage one: a supervised warm start that teaches a small base the format, the task and to read a policy.

Each example is one sequence with two endings, the bare verdict and the thought with its verdict, which see the
content but not each other. The policy part, shared by a batch, is computed once a step: its keys and values are
leaves to which every micro-batch adds its gradient, and one backward pass through the policy part ends the step.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional
from transformers import DynamicCache, PreTrainedTokenizerBase

from rsafe_plugins.alignment.examples import Example, PolicyVariant
from rsafe_plugins.alignment.export import ExportError, read_gguf
from rsafe_plugins.alignment.prompts import TrainingPrompt
from rsafe_plugins.alignment.recipe import CHECKPOINTS, WarmStartSettings
from rsafe_plugins.backends.causal_lm import load
from rsafe_plugins.backends.tokens import common_length
from rsafe_plugins.errors import BackendUnavailable, RSafeError
from rsafe_plugins.guard.prompt import GuardPrompt

BARE_PREFILL = "\\boxed{"
THOUGHT_PREFILL = "<think>"
CHECKPOINT_SECONDS = 300


log = logging.getLogger(__name__)


class AlignmentError(RSafeError):
    """Training can't go on: the data, the base or a setting is wrong, or the loss is no number."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in one sentence that a folder for what was trained can't be written.

    Raises:
        AlignmentError: It can't.
    """
    try:
        yield
    except (OSError, ValueError, AssertionError, SafetensorError) as error:
        raise AlignmentError(
            f"{folder} can't be written ({error}): make room, and start again to go on from there."
        ) from error


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example: what follows the shared part, then its endings with a weight for each target.

    Attributes:
        prompt: What the endings have in common.
        endings: Token ids, and the weight of each in the loss.
        unsafest: Which of the endings should say `unsafe` with the highest probability; None where they aren't
            compared.
        distilled: Share of the targets that is what the adapter that training goes on from predicts there, 0 to 1.
    """

    prompt: list[int]
    endings: list[tuple[list[int], list[float]]]
    unsafest: int | None = None
    distilled: float = 0.0


@dataclass(slots=True)
class Log:
    """One line a step, appended to `log.jsonl`."""

    path: Path
    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, **row: float) -> None:
        """Appends one step."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep(self, steps: int) -> None:
        """Drops what an earlier run in this folder wrote after its first `steps`."""
        lines = self.path.read_text("utf-8").splitlines()[:steps] if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self.path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def load_base(
    base: str | Path, *, merged: Path | None = None, dtype: str = "float32"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, from a Hugging Face name or folder, or from a GGUF file.

    Args:
        base: Name, folder or file.
        merged: Folder of a PEFT adapter to add to the weights, in float32; None for the weights as they are.
        dtype: `float32` or `bfloat16`.

    Raises:
        AlignmentError: It can't be loaded.
    """
    try:
        loaded = load(str(base), adapter=str(merged) if merged else None, device="cpu", dtype=dtype)
    except BackendUnavailable as error:
        raise AlignmentError(str(error)) from error
    return loaded.model, loaded.tokenizer


class BatchEncoder(abc.ABC):
    """Turns a batch into token ids: the part that all of it shares, and each one's own.

    Args:
        tokenizer: The base's tokenizer.
        prompt: The prompt that the guard will use.
        settings: How long contents may be, and what weighs how much.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: GuardPrompt, settings: WarmStartSettings
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = TrainingPrompt(
            tokenizer, prompt, settings.max_prompt_tokens, settings.max_response_tokens
        )
        self.shortened = self._prompt.shortened
        self._settings = settings
        self.label_ids = self._ids("safe}")[0], self._ids("unsafe}")[0]

    @abc.abstractmethod
    def encode(self, variant: Any, examples: Sequence[Any]) -> tuple[list[int], list[Encoded]]:
        """The ids of the part that all share, then a sequence an example."""

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class Encoder(BatchEncoder):
    """Encodes examples that share a policy."""

    def encode(self, variant: PolicyVariant, examples: Sequence[Example]) -> tuple[list[int], list[Encoded]]:
        """The ids of the shared part, then a sequence an example; together they are the guard's own prompt."""
        prompts = [self._ids(self._prompt.text(variant.policy, example.content)) for example in examples]
        shared = common_prefix(prompts)
        sequences = [
            Encoded(
                ids[shared:],
                self._endings(example),
                distilled=self._settings.distill.share(example.content.kind),
            )
            for ids, example in zip(prompts, examples, strict=True)
        ]
        return prompts[0][:shared], sequences

    def _endings(self, example: Example) -> list[tuple[list[int], list[float]]]:
        settings = self._settings
        end = str(self._tokenizer.eos_token)
        named = ""
        if example.label == "unsafe" and example.categories:
            named = f"\nCategories: {', '.join(example.categories)}{end}"
        # In one go, as the guard asks for the categories: some tokenizers join the box's end and the new line.
        answer = self._ids(f"{example.label}}}{named}")
        verdict = common_length(tuple(answer), tuple(self._ids(f"{example.label}}}")))
        bare = self._ids(BARE_PREFILL)
        weights = label_weights(verdict) + _spread(settings.category_weight, len(answer) - verdict)
        endings = [(bare + answer, [0.0] * len(bare) + weights)]
        if example.thought is not None:
            opening = self._ids(THOUGHT_PREFILL)
            thought = self._ids(f"{example.thought}</think>\n{BARE_PREFILL}{example.label}}}{end}")
            endings.append(
                (opening + thought, [0.0] * len(opening) + _spread(settings.thought_weight, len(thought)))
            )
        return endings


def _join_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as `torchrun` set them up; one process otherwise."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return torch.distributed.get_rank(), processes


def _linear_names(model: Any) -> list[str]:
    """What the linear modules of the decoder layers are called, such as `q_proj`."""
    modules = model.model.layers.named_modules()
    return sorted(
        {name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, torch.nn.Linear)}
    )


def with_lora(model: Any, *, rank: int, first_layer: int, adapter: Path | None) -> PeftModel:
    """The model with a LoRA to train on all linear layers of its decoder.

    Args:
        model: A causal LM.
        rank: Rank of the LoRA; its alpha is twice that.
        first_layer: The LoRA begins at this decoder layer, counted from 0.
        adapter: Folder of a PEFT adapter to go on from, or the GGUF file of one, of the same rank and layers; None
            starts a new one.

    Raises:
        AlignmentError: The adapter can't be loaded, or is of another shape.
    """
    layers = model.config.num_hidden_layers
    if first_layer >= layers:
        raise AlignmentError(
            f"first_layer is {first_layer}, and the base has the layers 0 to {layers - 1}: name one of these."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=_linear_names(model),
        layers_to_transform=list(range(first_layer, layers)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    if adapter is None:
        return get_peft_model(model, config)
    return (_trainable if adapter.is_dir() else _trainable_gguf)(model, adapter, config)


def _trainable(model: Any, folder: Path, wanted: LoraConfig) -> PeftModel:
    """The model with an adapter that was trained before."""
    try:
        found = LoraConfig.from_pretrained(str(folder))
        for name in ("r", "lora_alpha", "layers_to_transform"):
            if getattr(found, name) != getattr(wanted, name):
                raise AlignmentError(
                    f"The adapter {folder} has {name} {getattr(found, name)}, and this run asks for "
                    f"{getattr(wanted, name)}: give the rank and the first layer that it was trained with."
                )
        stored = load_file(folder / "adapter_model.safetensors")
        peft = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        # PEFT takes no notice of tensors that have no place in the base.
        if stored.keys() != get_peft_model_state_dict(peft).keys():
            raise ValueError("its tensors are of another base, or of other layers")
        return peft
    except (OSError, RuntimeError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise AlignmentError(f"The adapter {folder} can't be loaded: {error}") from error


def _trainable_gguf(model: Any, file: Path, wanted: LoraConfig) -> PeftModel:
    """The model with an adapter that `rsafe align` exported for llama.cpp, which is as precise as float16."""
    try:
        tensors = read_gguf(file, model.config.to_dict())
    except ExportError as error:
        raise AlignmentError(str(error)) from error
    peft = get_peft_model(model, wanted)
    own = get_peft_model_state_dict(peft)
    if {name: tuple(one.shape) for name, one in own.items()} != {
        name: one.shape for name, one in tensors.items()
    }:
        raise AlignmentError(
            f"The adapter {file} is of another rank, or of other layers, than this run asks for (rank {wanted.r}): "
            "give those that it was trained with."
        )
    set_peft_model_state_dict(peft, {name: torch.from_numpy(one) for name, one in tensors.items()})
    return peft


def label_weights(tokens: int) -> list[float]:
    """Weights of the tokens of a label: its first one is the verdict, what follows is spelling."""
    return [1.0, *_spread(0.05, tokens - 1)]


def _spread(weight: float, tokens: int) -> list[float]:
    return [weight / tokens] * tokens if tokens else []


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with; at least the last one of each is its own."""
    shortest = min(len(ids) for ids in sequences) - 1
    first = sequences[0]
    for position in range(shortest):
        if any(ids[position] != first[position] for ids in sequences):
            return position
    return shortest


class WarmStart:
    """Trains a LoRA adapter on batches of examples; started by `torchrun`, in several processes.

    Args:
        base: A Hugging Face name or folder, or a GGUF file.
        prompt: The prompt that the guard will use.
        settings: How to train.
        out: Folder for `log.jsonl` and the adapter.
        run: What else has to be the same for a run that died to go on, such as the data, by name.
        adapter: Folder of a PEFT adapter to go on from, of the same rank and layers; None starts a new one.
        encoder: What turns the batches into token ids.

    Raises:
        AlignmentError: The base or the adapter can't be loaded, or the adapter is of another shape.
    """

    def __init__(
        self,
        base: str | Path,
        prompt: GuardPrompt,
        settings: WarmStartSettings,
        out: Path,
        run: Mapping[str, Any] | None = None,
        adapter: Path | None = None,
        encoder: Callable[[PreTrainedTokenizerBase, GuardPrompt, WarmStartSettings], BatchEncoder] = Encoder,
    ) -> None:
        if settings.distill.any and adapter is None:
            raise AlignmentError(
                "distill needs an adapter to go on from, whose answers are kept, and there is none: name one with "
                "--adapter, or leave distill out."
            )
        self.rank, self.processes = _join_processes()
        torch.manual_seed(settings.seed)
        model, tokenizer = load_base(base)
        # What is trained stays in float32, and so do buffers: rounded frequencies would turn positions into others.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, settings.dtype))
        self.settings = settings
        self.tokenizer = tokenizer
        self.encoder = encoder(tokenizer, prompt, settings)
        self._run = {
            **settings.model_dump(mode="json"),
            "base": str(base),
            "adapter": str(adapter) if adapter else None,
            "template": prompt.digest,
            "processes": self.processes,
            **(run or {}),
        }
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        self.model: PeftModel = with_lora(
            model, rank=settings.rank, first_layer=settings.first_layer, adapter=adapter
        ).to(self.device)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # What the adapter was, where some of what it says is kept.
        kept = self._trained if settings.distill.any else []
        self._start = [parameter.detach().clone() for parameter in kept]
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.log = Log(out / "log.jsonl")

    def train(
        self,
        batches: Iterable[tuple[Any, Sequence[Any]]],
        total: int,
        on_step: Callable[[int, float], None] = lambda seen, loss: None,
    ) -> None:
        """One pass over the batches.

        Args:
            batches: What the encoder takes, such as a policy and its examples; one optimizer step a batch.
            total: How many examples there will be, for the learning rate.
            on_step: Called after each step with the examples seen and the step's loss.

        Raises:
            AlignmentError: The loss is no finite number.
        """
        parameters = self._trained
        optimizer = torch.optim.AdamW(parameters, lr=self.settings.learning_rate, weight_decay=0.0)
        done_steps, seen, before = self._restore(parameters, optimizer)
        if self.rank == 0:
            self.log.keep(done_steps)
        started = saved = time.monotonic()
        for step, (variant, examples) in enumerate(batches):
            if step < done_steps:
                continue
            minutes = self._agreed(before + (time.monotonic() - started) / 60)
            done = max(seen / total, minutes / self.settings.minutes if self.settings.minutes else 0.0)
            if done >= 1:
                break
            rate = self.settings.learning_rate * min(1.0 - done, (step + 1) / self.settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = self.step(variant, examples)
            self._join_gradients(parameters)
            if not math.isfinite(loss):
                raise AlignmentError(
                    f"The loss at step {step} is {loss}; lower the learning rate (now {rate:.1e})."
                )
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(norm):
                raise AlignmentError(
                    f"The gradient at step {step} is {norm}; lower the learning rate (now {rate:.1e})."
                )
            optimizer.step()
            optimizer.zero_grad()
            seen += len(examples)
            if self.rank == 0:
                self.log.add(step=step, seen=seen, loss=loss, norm=norm, rate=rate, minutes=minutes)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    saved = time.monotonic()
                    self._checkpoint(parameters, optimizer, step + 1, seen, minutes)
            on_step(seen, loss)
        if self.rank == 0 and self.log.rows:
            now = before + (time.monotonic() - started) / 60
            try:
                self._checkpoint(parameters, optimizer, int(self.log.rows[-1]["step"]) + 1, seen, now)
            except AlignmentError as error:
                log.warning("%s What was trained may still be saved.", error)

    def _checkpoint(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        steps: int,
        seen: int,
        minutes: float,
    ) -> None:
        """Writes all that a run needs to go on after `steps`."""
        path = self.out / CHECKPOINTS["warm-start"]
        state = {
            "run": self._run,
            "steps": steps,
            "seen": seen,
            "minutes": minutes,
            "parameters": [parameter.data for parameter in parameters],
            "optimizer": optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        try:
            torch.save(state, partial)
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            raise AlignmentError(
                f"{partial} can't be written ({error}): make room, and start again."
            ) from error

    def _restore(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, int, float]:
        """Takes up a run that died: its steps, examples and minutes so far; zeros where there is none."""
        state = self.check_goes_on()
        if state is None:
            return 0, 0, 0.0
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        return state["steps"], state["seen"], state["minutes"]

    def check_goes_on(self) -> dict[str, Any] | None:
        """What a run that died has left; None where there is none.

        Raises:
            AlignmentError: It can't be read, or had other settings.
        """
        path = self.out / CHECKPOINTS["warm-start"]
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            state["run"], state["parameters"], state["optimizer"]
        except (OSError, EOFError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise AlignmentError(
                f"{path} can't be read ({type(error).__name__}): remove it to start again from the beginning."
            ) from error
        changed = [name for name in self._run if state["run"].get(name) != self._run[name]]
        if changed:
            raise AlignmentError(
                f"{path} is of a run that died, with another {' and '.join(changed)}: start it with the same "
                "options to go on, or name another folder."
            )
        return dict(state)

    def step(self, variant: Any, examples: Sequence[Any]) -> float:
        """Adds this process's part of the gradient of one batch; returns the batch's mean loss."""
        return self._step(*self.encoder.encode(variant, examples))

    def _step(self, shared: list[int], sequences: Sequence[Encoded]) -> float:
        sequences = sorted(sequences, key=lambda s: len(s.prompt) + sum(len(ids) for ids, _ in s.endings))
        count = len(sequences)
        sequences = sequences[self.rank :: self.processes]
        size = self.settings.micro_batch
        parts = [
            lay_out(sequences[start : start + size], len(shared)) for start in range(0, len(sequences), size)
        ]
        taught = self._taught(shared, parts)
        with torch.set_grad_enabled(self.settings.through_policy):
            layers = self._prefix(shared)
        leaves = [
            tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in pair) for pair in layers
        ]
        total = 0.0
        for layout, teacher in zip(parts, taught, strict=True):
            loss = self._loss(self._logits(leaves, layout), layout, teacher) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        pairs = [
            (tensor, leaf)
            for ours in zip(layers, leaves, strict=True)
            for tensor, leaf in zip(*ours, strict=True)
        ]
        trained = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
        if trained:
            torch.autograd.backward([tensor for tensor, _ in trained], [gradient for _, gradient in trained])
        return self._agreed(total) * self.processes

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    def _agreed(self, value: float) -> float:
        """The mean over all processes, so that they decide alike."""
        if self.processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor) / self.processes

    def _join_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        if self.processes == 1:
            return
        for parameter in parameters:
            if (
                parameter.grad is None
            ):  # a batch smaller than the number of processes leaves some without work
                parameter.grad = torch.zeros_like(parameter)
        joined = torch.cat(
            [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        )
        torch.distributed.all_reduce(joined)
        for parameter, part in zip(
            parameters, torch.split(joined, [p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    def _parts(self) -> tuple[Any, Any]:
        base: Any = self.model.get_base_model()
        return base.model, base.lm_head

    def _prefix(self, shared: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the shared part, a pair a layer."""
        decoder, _ = self._parts()
        with self._precision():
            prefix = decoder(input_ids=torch.tensor([shared], device=self.device), use_cache=True)
        return [(layer.keys, layer.values) for layer in prefix.past_key_values.layers]

    def _logits(self, layers: Sequence[tuple[torch.Tensor, ...]], layout: Layout) -> torch.Tensor:
        """What is predicted after the shared part at each of the layout's targets, (targets, vocabulary)."""
        decoder, head = self._parts()
        rows = len(layout.ids)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        with self._precision():
            hidden = decoder(
                input_ids=layout.ids.to(self.device),
                attention_mask=layout.mask.to(self.device),
                position_ids=layout.positions.to(self.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            row, column = layout.sources
            logits: torch.Tensor = head(hidden[row.to(self.device), column.to(self.device)])
        return logits.float()

    @torch.no_grad()
    def _taught(self, shared: list[int], parts: Sequence[Layout]) -> list[torch.Tensor | None]:
        """What the adapter that training goes on from predicts at the targets that are distilled, (distilled, ids)."""
        wanted = [layout.distilled > 0 for layout in parts]
        if not any(bool(one.any()) for one in wanted):
            return [None] * len(parts)
        now = [parameter.data for parameter in self._trained]
        for parameter, start in zip(self._trained, self._start, strict=True):
            parameter.data = start
        try:
            layers = self._prefix(shared)
            return [
                self._logits(layers, layout)[one.to(self.device)].softmax(-1) if one.any() else None
                for layout, one in zip(parts, wanted, strict=True)
            ]
        finally:
            for parameter, value in zip(self._trained, now, strict=True):
                parameter.data = value

    def _loss(self, logits: torch.Tensor, layout: Layout, teacher: torch.Tensor | None) -> torch.Tensor:
        losses = functional.cross_entropy(logits, layout.targets.to(self.device), reduction="none")
        if teacher is not None:
            share = layout.distilled.to(self.device)
            kept = torch.zeros_like(losses)
            kept[share > 0] = functional.cross_entropy(logits[share > 0], teacher, reduction="none")
            losses = (1 - share) * losses + share * kept
        loss = (losses * layout.weights.to(self.device)).sum()
        safe, unsafe = self.encoder.label_ids
        for verdicts, unsafest in layout.compared:
            surer = logits[verdicts, unsafe] - logits[verdicts, safe]
            loss = loss + functional.cross_entropy(surer, torch.tensor(unsafest, device=self.device))
        return loss

    @property
    def base_config(self) -> dict[str, Any]:
        """The base's configuration, as Hugging Face names it."""
        base: Any = self.model.get_base_model()
        return dict(base.config.to_dict())

    def save(self) -> Path:
        """Writes the PEFT adapter, from the first process; returns its folder.

        Raises:
            AlignmentError: Training went wrong in its last step, or the folder can't be written.
        """
        folder = self.out / "adapter"
        if self.rank == 0:
            if not all(torch.isfinite(parameter).all() for parameter in self._trained):
                raise AlignmentError(
                    "The adapter holds numbers that are none after the last step: lower the learning rate."
                )
            with writing(folder):
                self.model.save_pretrained(str(folder))
        return folder

    def finish(self) -> None:
        """Removes the checkpoint, which a run whose results are all written has no use for."""
        if self.rank == 0:
            (self.out / CHECKPOINTS["warm-start"]).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Layout:
    """Padded tensors of one micro-batch of `rows` sequences, `width` tokens wide.

    Attributes:
        ids: Token ids, (rows, width).
        positions: Positions counted from the start of the shared part, (rows, width); each ending begins where
            the prompt ends.
        mask: Additive attention mask, (rows, 1, width, shared + width): 0 where a token may look, the lowest
            float where it may not.
        sources: Rows and columns of the tokens that predict something, each (targets,).
        targets: The token ids that they should predict, (targets,).
        weights: Weight of each, (targets,).
        distilled: Share of each that is what the adapter that training goes on from predicts there, (targets,).
        compared: For each sequence whose endings are compared, the targets that are their verdicts, and which of these
            is the unsafest.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    sources: tuple[torch.Tensor, torch.Tensor]
    targets: torch.Tensor
    weights: torch.Tensor
    distilled: torch.Tensor
    compared: list[tuple[list[int], int]]


def lay_out(part: Sequence[Encoded], shared: int) -> Layout:
    """Lays sequences side by side, so that the endings of one see its prompt and the shared part, not each other."""
    width = max(len(s.prompt) + sum(len(ids) for ids, _ in s.endings) for s in part)
    ids = torch.zeros(len(part), width, dtype=torch.long)
    positions = torch.full((len(part), width), shared, dtype=torch.long)
    visible = torch.zeros(len(part), width, shared + width, dtype=torch.bool)
    visible[:, :, :shared] = True
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    distilled: list[float] = []
    compared: list[tuple[list[int], int]] = []
    for row, sequence in enumerate(part):
        verdicts: list[int] = []
        length = len(sequence.prompt)
        ids[row, :length] = torch.tensor(sequence.prompt)
        positions[row, :length] = torch.arange(shared, shared + length)
        visible[row, :length, shared : shared + length] = torch.ones(length, length).tril().bool()
        start = length
        for tokens, token_weights in sequence.endings:
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = torch.arange(shared + length, shared + length + len(tokens))
            visible[row, start:end, shared : shared + length] = True
            visible[row, start:end, shared + start : shared + end] = (
                torch.ones(len(tokens), len(tokens)).tril().bool()
            )
            verdicts.append(len(targets))
            for offset in range(1, len(tokens)):
                if token_weights[offset] > 0:
                    rows.append(row)
                    columns.append(start + offset - 1)
                    targets.append(tokens[offset])
                    weights.append(token_weights[offset])
                    distilled.append(sequence.distilled)
            start = end
        if sequence.unsafest is not None:
            compared.append((verdicts, sequence.unsafest))
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return Layout(
        ids,
        positions,
        mask.unsqueeze(1),
        (torch.tensor(rows), torch.tensor(columns)),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(distilled),
        compared,
    )
