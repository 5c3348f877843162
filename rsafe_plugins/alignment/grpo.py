"""Stage two: reinforced alignment by GRPO (arXiv 2402.03300) with rule-based rewards, as in RSafe (arXiv 2506.07736).

TRL trains; what is ours is what it trains on: the guard's own prompt with its begun thought, a policy for each item,
the rewards, the order of items, and what is watched.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from datasets import Dataset  # type: ignore[import-untyped]
from torch.nn.functional import pad
from torch.utils.data import Sampler
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    RepetitionPenaltyLogitsProcessor,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback  # type: ignore[attr-defined]
from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]
from trl.models import unwrap_model_for_generation  # type: ignore[attr-defined]

from rsafe_plugins.alignment.curves import check_rows, draw_curves, log_row
from rsafe_plugins.alignment.draws import Draws, DrawSampler, place_of
from rsafe_plugins.alignment.examples import injection_variant
from rsafe_plugins.alignment.prompts import TrainingPrompt
from rsafe_plugins.alignment.recipe import GRPOSettings
from rsafe_plugins.alignment.rewards import (
    accuracy_reward,
    adherence_rewards,
    format_reward,
    length_reward,
    verdict,
)
from rsafe_plugins.alignment.warm_start import (
    THOUGHT_PREFILL,
    AlignmentError,
    Log,
    load_base,
    with_lora,
    writing,
)
from rsafe_plugins.backends.base import Completion, Request
from rsafe_plugins.backends.causal_lm import CausalLM, Loaded
from rsafe_plugins.errors import BackendError, InputTooLong
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.evaluation.metrics import measure
from rsafe_plugins.evaluation.run import sample
from rsafe_plugins.guard.prompt import GuardPrompt
from rsafe_plugins.guard.verdict import Label, Verdict
from rsafe_plugins.policy import Policy

STATE = "rsafe.json"  # written last into a checkpoint, so one that has it is whole
_KEPT_CHECKPOINTS = 2
_EVALUATED_AT_ONCE = 16
_LIKELIEST = 512  # next tokens among which one is drawn, if they reach `top_p`
_SAME = 1e-6  # rewards that differ by less are the same
_DRAWN_EVERY = 10  # steps between renewals of the picture

Solved = dict[int, list[int]]


class Rewards:
    """The reward functions that TRL calls with each step's completions, and what they tell of the step.

    Args:
        settings: Their weights, and the token limit.
        solved: Where each step's items are noted whose completions were all right.
    """

    def __init__(self, settings: GRPOSettings, solved: Solved) -> None:
        self._limit = settings.max_tokens
        self._solved = solved
        weighted: list[tuple[Callable[..., Sequence[float | None]], float]] = [
            (self.accuracy, settings.accuracy_weight),
            (self.format, settings.format_weight),
        ]
        if settings.length_weight:
            weighted.append((self.length, settings.length_weight))
        if settings.adherence_weight:
            weighted.append((self.adherence, settings.adherence_weight))
        self.functions = [function for function, _ in weighted]
        self.weights = [weight for _, weight in weighted]

    def accuracy(
        self,
        completions: Sequence[str],
        label: Sequence[Label],
        item: Sequence[int],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """1 for the right label in the right form; notes what was said, and which items are solved."""
        said = [verdict(_answer(completion)) for completion in completions]
        log_metric("said_safe", said.count("safe") / len(said))
        log_metric("said_unsafe", said.count("unsafe") / len(said))
        log_metric("is_unsafe", list(label).count("unsafe") / len(label))
        rewards = [
            accuracy_reward(_answer(text), right) for text, right in zip(completions, label, strict=True)
        ]
        worst: dict[int, float] = {}
        for one, reward in zip(item, rewards, strict=True):
            worst[one] = min(reward, worst.get(one, 1.0))
        # Each process sees its own part of the step, and all have to draw the same items next.
        solved = gather_object([one for one, reward in worst.items() if reward])
        self._solved[trainer_state.global_step] = sorted(solved)
        return rewards

    def format(self, completions: Sequence[str], **_: Any) -> list[float]:
        """1 for the right form."""
        return [format_reward(_answer(completion)) for completion in completions]

    def length(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        label: Sequence[Label],
        **_: Any,
    ) -> list[float]:
        """The share of tokens that a right answer leaves unused."""
        return [
            length_reward(_answer(text), right, len(ids), self._limit)
            for text, ids, right in zip(completions, completion_ids, label, strict=True)
        ]

    def adherence(
        self, completions: Sequence[str], label: Sequence[Label], pair: Sequence[str], **_: Any
    ) -> list[float | None]:
        """How far a right answer was right because of the policy."""
        right = [
            verdict(_answer(completion)) == one for completion, one in zip(completions, label, strict=True)
        ]
        return adherence_rewards(right, pair, label)


def _answer(completion: str) -> str:
    return THOUGHT_PREFILL + completion


class HeldOut:
    """Items that training never sees, judged greedily after a thought, without the guard's help to close it.

    Args:
        items: At least one item.
        prompt: How they are put.
        tokenizer: The base's tokenizer.
        max_tokens: Tokens that an answer may have.
    """

    def __init__(
        self,
        items: Sequence[LabelledItem],
        prompt: TrainingPrompt,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
    ) -> None:
        self._items = list(items)
        self._tokenizer = tokenizer
        whole, injection = Policy.load("rsafe-18"), injection_variant().policy
        self._requests = [
            Request(
                messages=prompt.messages(injection if item.task == "document" else whole, item.content()),
                prefill=THOUGHT_PREFILL,
                max_tokens=max_tokens,
            )
            for item in self._items
        ]

    def measure(self, model: Any, process: int = 0, processes: int = 1) -> dict[str, float]:
        """Both error rates, accuracy, F1, the share of answers in the form, and their mean length.

        Args:
            model: The model as it is; it is asked in evaluation mode.
            process: Which part of the items this process judges, counted from 0.
            processes: How many parts there are; all have to call.
        """
        mine = list(range(len(self._items)))[process::processes]
        judged = dict(gather_object(list(zip(mine, self._verdicts(model, mine), strict=True))))
        verdicts = [judged[index] for index in range(len(self._items))]
        found = measure(self._items, verdicts)
        right = sum(item.label == one.label for item, one in zip(self._items, verdicts, strict=True))
        values = {
            "f1": found.f1,
            "accuracy": right / found.items,
            "missed_harm": None if found.recall is None else 1 - found.recall,
            "false_positives": found.false_positive_rate,
            "format_rate": 1 - found.failures / found.items,
            "tokens": found.tokens,
        }
        return {f"held_out_{name}": value for name, value in values.items() if value is not None}

    def _verdicts(self, model: Any, indices: Sequence[int]) -> list[Verdict]:
        engine = CausalLM(Loaded(model, self._tokenizer, next(model.parameters()).device))
        answers: dict[int, Completion | BackendError] = {}
        waiting = []
        for index in indices:
            try:
                waiting.append((index, engine.encode(self._requests[index])))
            except InputTooLong as error:
                answers[index] = error
        while waiting:
            chosen, shared = engine.plan([one for _, one in waiting], _EVALUATED_AT_ONCE)
            batch = [waiting[place] for place in chosen]
            answers.update(
                zip(
                    [index for index, _ in batch],
                    engine.answer([one for _, one in batch], shared, lambda _: True),
                    strict=True,
                )
            )
            waiting = [one for place, one in enumerate(waiting) if place not in chosen]
        return [_as_verdict(answers[index]) for index in indices]


def _as_verdict(answer: Completion | BackendError) -> Verdict:
    if isinstance(answer, BackendError):
        return Verdict(label=None, blocked=True)
    label = verdict(_answer(answer.text))
    return Verdict(label=label, blocked=label != "safe", usage=answer.usage)


class _Trainer(GRPOTrainer):
    """TRL's trainer with our order of items, which computes a prompt once for all its completions.

    Args:
        sampler: That order.
        settings: How to train.
        **arguments: TRL's own.
    """

    def __init__(self, sampler: DrawSampler, settings: GRPOSettings, **arguments: Any) -> None:
        self._sampler = sampler
        self._settings = settings
        super().__init__(**arguments)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return self._sampler

    def _calculate_rewards(self, *arguments: Any) -> torch.Tensor:
        """Each completion's rewards, of all processes; notes how many groups have earned the same."""
        rewards: torch.Tensor = super()._calculate_rewards(*arguments)
        earned = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        groups = earned.view(-1, self._settings.group_size)
        # TRL's own figure is of the whole step where the advantages are divided by that.
        alike = groups.amax(1) - groups.amin(1) < _SAME
        self._metrics["train"]["groups_alike"].append(float(alike.float().mean()))
        return rewards

    def _generate_single_turn(
        self, prompt_ids: Sequence[Sequence[int]], *arguments: Any, **more: Any
    ) -> tuple[list[list[int]], Any]:
        # A GPU is faster with all prompts in one batch, and processes may have to gather weights first.
        device = self.accelerator.device
        if self.use_vllm or device.type != "cpu" or self.accelerator.num_processes > 1:
            return super()._generate_single_turn(prompt_ids, *arguments, **more)  # type: ignore[no-any-return,no-untyped-call]
        completions: list[list[int]] = []
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            engine = CausalLM(Loaded(model, self.processing_class, device))
            for prompt, copies in groupby(map(tuple, prompt_ids)):
                completions += engine.sample(
                    prompt,
                    len(list(copies)),
                    self._drawn,
                    max_tokens=self._settings.max_tokens,
                    ends=self.eos_token_ids,
                )
        return completions, None

    def _drawn(self, seen: Any, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, drawn as the settings say."""
        settings = self._settings
        logits = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(seen, logits.float())
        chances = (logits / settings.temperature).softmax(-1)
        # Of so many tokens the likeliest few nearly always suffice, and to sort them all is slow.
        values, tokens = chances.topk(min(_LIKELIEST, chances.shape[-1]))
        if settings.top_p >= 1 or values.sum(-1).min() < settings.top_p:
            values, tokens = chances.sort(descending=True)
        before = values.cumsum(-1) - values
        drawn = torch.multinomial(values.masked_fill(before >= settings.top_p, 0), 1)
        return tokens.gather(-1, drawn)[:, 0]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        # Recomputed activations leave no cache, and processes that join gradients want one forward pass.
        if self.args.gradient_checkpointing or self.accelerator.num_processes > 1 or compute_aux_loss:
            with self._precision():
                return super()._get_per_token_logps_and_entropies(  # type: ignore[no-any-return]
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size,
                    compute_entropy,
                    compute_aux_loss,
                    **more,
                )
        padded = input_ids[:, :-logits_to_keep].masked_fill(attention_mask[:, :-logits_to_keep] == 0, -1)
        _, group = torch.unique(padded, dim=0, return_inverse=True)
        members = [(group == one).nonzero().flatten() for one in group.unique()]
        scored = [
            self._score_completions(
                model,
                padded[rows[0]][padded[rows[0]] >= 0],
                input_ids[rows, -logits_to_keep:],
                attention_mask[rows, -logits_to_keep:],
            )
            for rows in members
        ]
        back = torch.cat(members).argsort()
        entropies = torch.cat([entropy for _, entropy in scored])[back] if compute_entropy else None
        return torch.cat([logps for logps, _ in scored])[back], entropies, None

    def _score_completions(
        self, model: Any, prompt: torch.Tensor, completions: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of each token of some completions, (rows, tokens), of one prompt, (tokens,)."""
        rows, padded = completions.shape
        width = int(mask.sum(-1).max())
        completions, mask = completions[:, :width], mask[:, :width]
        with self._precision():
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._settings.through_prompt):
                cache = model(input_ids=prompt[None, :-1], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(rows)
            seen = torch.cat([prompt.new_ones(rows, len(prompt)), mask], dim=1)
            outputs = model(
                input_ids=torch.cat([prompt[-1:].expand(rows, 1), completions], dim=1),
                attention_mask=seen,
                past_key_values=cache,
                labels=torch.cat(
                    [prompt[-1:].expand(rows, 1), completions.masked_fill(mask == 0, -100)], dim=1
                ),
                fused_lm_head=True,
            )
        tail = (0, padded - width)
        return pad(outputs.log_probs[:, -width:], tail), pad(outputs.entropy[:, -width:], tail)

    def _precision(self) -> torch.autocast:
        # Not accelerate's, which would compute rollouts so too: token by token that is slower on a CPU.
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=_is_half(self._settings))


class GRPO:
    """Trains a guard by GRPO; started by `accelerate launch` or `torchrun`, in several processes.

    Args:
        base: A Hugging Face name or folder, or a GGUF file.
        prompt: The prompt that the guard will use.
        settings: How to train.
        items: What to train on.
        held_out: What `settings.evaluate_items` are drawn from to evaluate on.
        out: Folder for the log, the curves, checkpoints and what is trained.
        run: What else has to be the same for a run that died to go on, such as the data, by name.
        adapter: Folder of a PEFT adapter to go on from; None starts from the base. Where all weights are trained,
            it is added to them first.

    Raises:
        AlignmentError: The base or the adapter can't be loaded, or settings, processes and data don't fit each other.
        DataError: The items can't be drawn as the settings say.
    """

    def __init__(
        self,
        base: str | Path,
        prompt: GuardPrompt,
        settings: GRPOSettings,
        items: Sequence[LabelledItem],
        held_out: Sequence[LabelledItem],
        out: Path,
        run: Mapping[str, Any] | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.settings = settings
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.draws = Draws(items, settings.policies, paired=settings.adherence_weight > 0, seed=settings.seed)
        self.steps = settings.steps or max(1, settings.epochs * len(self.draws) // settings.batch)
        self.checkpoints = out / "checkpoints"
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.processes = state.process_index, state.num_processes
        accumulated = _accumulated(settings, self.processes)
        if settings.rollouts == "vllm" and str(base).lower().endswith(".gguf"):
            raise AlignmentError(
                f"vLLM samples from a Hugging Face folder, and the base is {base}: give --base a folder or name, or "
                "take --rollouts transformers."
            )
        on_gpu = torch.cuda.is_available()
        torch.manual_seed(settings.seed)
        model, self.tokenizer = load_base(
            base,
            merged=adapter if settings.full else None,
            dtype="bfloat16" if on_gpu and _is_half(settings) and not settings.full else "float32",
        )
        if not settings.full:
            model = with_lora(model, rank=settings.rank, first_layer=settings.first_layer, adapter=adapter)
        self._prompt = TrainingPrompt(
            self.tokenizer, prompt, settings.max_prompt_tokens, settings.max_response_tokens
        )
        evaluated = sample(held_out, settings.evaluate_items, settings.seed)
        self.held_out = (
            HeldOut(evaluated, self._prompt, self.tokenizer, settings.max_tokens) if evaluated else None
        )
        self.solved: Solved = {}
        self._run = {
            **settings.model_dump(mode="json", exclude={"minutes"}),
            "base": str(base),
            "adapter": str(adapter) if adapter else None,
            "template": prompt.digest,
            "processes": self.processes,
            **(run or {}),
        }
        rewards = Rewards(settings, self.solved)
        self.log = Log(out / "log.jsonl")
        self.watch = _Watch(self)
        self.trainer = _Trainer(
            DrawSampler(
                self.draws,
                batch=settings.batch,
                steps=self.steps,
                group_size=settings.group_size,
                copies=accumulated,
                seed=settings.seed,
                solved=self.solved if settings.skip_solved else None,
            ),
            settings=settings,
            model=model,
            args=_config(settings, self.steps, accumulated, rewards.weights, self.checkpoints),
            processing_class=self.tokenizer,
            reward_funcs=rewards.functions,
            train_dataset=self._dataset(),
            callbacks=[self.watch],
        )
        # It writes to standard output, which is for the report.
        self.trainer.remove_callback(PrinterCallback)

    def _dataset(self) -> Dataset:
        """Every prompt that can be drawn, made when it is."""
        # A pass is shorter by the items that sit it out, at most by all of them, and not twice in a row.
        passes = 2 * (1 + self.steps * self.settings.batch // len(self.draws)) + 2
        rows = Dataset.from_dict({"row": list(range(passes * len(self.draws.items) * 2))})
        return rows.with_transform(self._columns)

    def _columns(self, rows: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        made = []
        for row in rows["row"]:
            epoch, item, side = place_of(row, len(self.draws.items))
            made.append(self.draws.draw(epoch, item)[side])
        return {
            "prompt": [self.prompt(one.policy, self.draws.items[one.item]) for one in made],
            "label": [one.label for one in made],
            "item": [one.item for one in made],
            "pair": [one.pair for one in made],
        }

    def prompt(self, policy: Policy, item: LabelledItem) -> str:
        """What the guard's engine is given to think about the item, with the begun thought."""
        text = self._prompt.text(policy, item.content()) + THOUGHT_PREFILL
        start = self.tokenizer.bos_token
        # TRL tokenizes with the special tokens that a template has written already.
        if start and self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id]:
            text = text.removeprefix(str(start))
        return text

    def train(self, on_step: Callable[[int, float], None] = lambda step, reward: None) -> None:
        """Trains, or goes on where a run with the same settings died.

        Args:
            on_step: Called after each step with the steps done and the step's mean reward.

        Raises:
            AlignmentError: The loss or the gradient is no finite number, the guard has collapsed, or the run that
                died had other settings.
        """
        checkpoint = self.check_goes_on()
        steps = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self.watch.begin(on_step)
        if self.rank == 0:
            self.log.keep(steps)
            writer = SummaryWriter(log_dir=str(self.out / "tensorboard"), purge_step=steps + 1)
            self.trainer.add_callback(TensorBoardCallback(tb_writer=writer))  # type: ignore[no-untyped-call]
        try:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False)
        except RuntimeError as error:
            # What torch says when it is to sample from probabilities that are no numbers.
            if "probability tensor" not in str(error):
                raise
            raise AlignmentError(
                f"The model's probabilities at step {self.trainer.state.global_step + 1} are no numbers: lower the "
                "learning rate, and go on from a checkpoint or an adapter that was good."
            ) from error

    def check_goes_on(self) -> Path | None:
        """The last whole checkpoint of a run that died; None where there is none.

        Raises:
            AlignmentError: That run had other settings.
        """
        whole = sorted(
            (folder for folder in self.checkpoints.glob("checkpoint-*") if _state(folder) is not None),
            key=lambda folder: int(folder.name.rpartition("-")[2]),
        )
        if not whole or (state := _state(whole[-1])) is None:
            return None
        changed = [name for name in self._run if state["run"].get(name) != self._run[name]]
        if changed:
            raise AlignmentError(
                f"{whole[-1]} is of a run that died, with another {' and '.join(changed)}: start it with the same "
                "options to go on, or name another folder."
            )
        self.solved.update({int(step): items for step, items in state["solved"].items()})
        self.watch.minutes_before = state["minutes"]
        return whole[-1]

    def write_state(self, step: int, minutes: float) -> None:
        """Adds to the checkpoint of that step what TRL doesn't know, from the first process."""
        if self.rank == 0:
            state = {"run": self._run, "minutes": minutes, "solved": self.solved}
            path = self.checkpoints / f"checkpoint-{step}" / STATE
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(state) + "\n", "utf-8")
            partial.replace(path)

    def measure_held_out(self) -> dict[str, float]:
        """The figures of the held-out items; none where there are none."""
        if self.held_out is None:
            return {}
        trainer = self.trainer
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            model.eval()
            found = self.held_out.measure(model, self.rank, self.processes)
            model.train()
        return found

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.trainer.accelerator.device  # type: ignore[no-any-return]

    @property
    def base_config(self) -> dict[str, Any]:
        """The base's configuration, as Hugging Face names it."""
        return dict(self.trainer.accelerator.unwrap_model(self.trainer.model).config.to_dict())

    def save(self) -> Path:
        """Writes the PEFT adapter, or where all weights were trained the model; returns its folder.

        Raises:
            AlignmentError: The folder can't be written; the last checkpoint stays.
        """
        folder = self.out / ("model" if self.settings.full else "adapter")
        with writing(folder):
            if self.settings.full:
                self.trainer.save_model(str(folder))
            elif self.rank == 0:
                model = self.trainer.accelerator.unwrap_model(self.trainer.model)
                model.save_pretrained(str(folder), selected_adapters=["default"])
        return folder

    def finish(self) -> None:
        """Removes the checkpoints, which a run whose results are all written has no use for."""
        if self.rank == 0:
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """What was added to a checkpoint; None where it is missing or cut off, as when its writing was."""
    try:
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"run", "solved", "minutes"} <= state.keys() else None


class _Watch(TrainerCallback):
    """Writes the log, evaluates, keeps the time, and stops what can't go on."""

    def __init__(self, stage: GRPO) -> None:
        self._stage = stage
        self._started = time.monotonic()
        self._on_step: Callable[[int, float], None] = lambda step, reward: None
        self._before: dict[str, float] = {}
        self._held_out: dict[str, float] = {}
        self.minutes_before = 0.0

    def begin(self, on_step: Callable[[int, float], None]) -> None:
        self._started = time.monotonic()
        self._on_step = on_step

    @property
    def minutes(self) -> float:
        return self.minutes_before + (time.monotonic() - self._started) / 60

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._before = self._stage.measure_held_out()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        settings = self._stage.settings
        if settings.minutes is not None:
            # The slowest clock decides for all processes.
            control.should_training_stop |= max(gather_object([self.minutes])) >= settings.minutes
            # Otherwise what came after the last checkpoint would be lost if the adapter can't be written.
            control.should_save |= control.should_training_stop
        last = control.should_training_stop or state.global_step == state.max_steps
        if last or state.global_step % settings.evaluate_every == 0:
            self._held_out = self._stage.measure_held_out()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        if "reward" not in logs:
            return  # the summary at the end
        for name in [name for name, value in logs.items() if value is None]:
            del logs[name]  # a reward that no completion of the step was up for
        logs.update(self._held_out or self._before)
        row = log_row(state.global_step, self.minutes, logs)
        if self._held_out:  # where the first step is measured, too
            row |= {f"before_{name}": value for name, value in self._before.items()}
        self._held_out, self._before = {}, {}
        if self._stage.rank == 0:
            self._stage.log.add(**row)
        else:
            self._stage.log.rows.append(row)
        rows = self._stage.log.rows
        check_rows(rows, self._stage.settings.collapse_window)
        if self._stage.rank == 0 and (state.global_step % _DRAWN_EVERY == 1 or "held_out_accuracy" in row):
            draw_curves(rows, self._stage.out / "curves.png")
        self._on_step(state.global_step, row["reward"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stage.write_state(state.global_step, self.minutes)


def _accumulated(settings: GRPOSettings, processes: int) -> int:
    """Parts that a process computes a step's gradient in.

    Raises:
        AlignmentError: The step's completions can't be shared out, with each group in one process.
    """
    prompts, rest = divmod(settings.batch, processes)
    together = 2 if settings.adherence_weight else 1
    if rest or prompts % together or prompts * settings.group_size % settings.micro_batch:
        raise AlignmentError(
            f"The {settings.batch} prompts of a batch must share out evenly over {processes} processes"
            f"{', pairs undivided,' if together == 2 else ''} and their {settings.group_size} completions each over "
            f"parts of micro_batch {settings.micro_batch}: change batch or micro_batch."
        )
    return prompts * settings.group_size // settings.micro_batch


def _is_half(settings: GRPOSettings) -> bool:
    """Whether the loss is computed in bfloat16."""
    return settings.dtype == "bfloat16" or (settings.dtype is None and torch.cuda.is_available())


def _config(
    settings: GRPOSettings, steps: int, accumulated: int, weights: Sequence[float], folder: Path
) -> GRPOConfig:
    """The settings as TRL names them."""
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=accumulated,
        num_generations=settings.group_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        max_completion_length=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        beta=settings.kl,
        loss_type="grpo",
        scale_rewards=settings.scale,
        reward_weights=list(weights),
        use_vllm=settings.rollouts == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=settings.vllm_memory,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=on_gpu and _is_half(settings),
        use_cpu=not on_gpu,
        seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=_KEPT_CHECKPOINTS,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
