import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsafe_plugins.alignment.recipe import GRPOSettings, load_recipe
from rsafe_plugins.alignment.warm_start import AlignmentError, load_base
from rsafe_plugins.backends.base import Request
from rsafe_plugins.backends.encoding import encode
from rsafe_plugins.cli import main
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.prompt import GuardPrompt
from rsafe_plugins.policy import Policy

pytestmark = pytest.mark.align

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "learning_rate": 1e-2,
    "batch": 4,
    "group_size": 4,
    "micro_batch": 8,
    "max_tokens": 40,
    "temperature": 1.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "scale": "batch",
    "adherence_weight": 0.2,
    "length_weight": 0.1,
    "skip_solved": True,
    "gradient_checkpointing": False,
    "kl": 0.0,
    "policies": {"whole": 0.0},
    "evaluate_every": 2,
    "evaluate_items": 4,
    "save_every": 2,
    "steps": 4,
}
ITEMS = [
    LabelledItem(
        id=str(n),
        task="prompt",
        prompt=f"text {n}",
        label="unsafe" if n % 2 else "safe",
        categories=("Hate",) if n % 2 else (),
    )
    for n in range(12)
]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of few bytes, which are the tiny base's tokens."""
    path = tmp_path_factory.mktemp("template") / "short.jinja"
    path.write_text("{% for c in categories %}{{ c.id }} {% endfor %}{{ conversation }}")
    return path


@pytest.fixture(scope="session")
def speaking_base(tiny_base: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, taught to answer in the form now and then, whatever it is asked."""
    model, tokenizer = load_base(tiny_base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    asked = "<|im_start|>user\n1 2 3 User: text<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        tokenizer(f"{asked}<think>{thought}</think>\\boxed{{{label}}}<|im_end|>")["input_ids"]
        for label in ("safe", "unsafe")
        for thought in ("a", "bb")
    ]
    width, start = max(map(len, rows)), len(tokenizer(asked)["input_ids"])
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    labels = torch.tensor([[-100] * start + row[start:] + [-100] * (width - len(row)) for row in rows])
    model.train()
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("speaking-base")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


Stage = Callable[..., Any]


@pytest.fixture
def stage(speaking_base: Path, template: Path, tmp_path: Path) -> Stage:
    from rsafe_plugins.alignment.grpo import GRPO

    def make(folder: str = "run", adapter: Path | None = None, **changed: Any) -> GRPO:
        settings = GRPOSettings.model_validate({**SETTINGS, **changed})
        prompt = GuardPrompt(template)
        return GRPO(speaking_base, prompt, settings, ITEMS, ITEMS[:4], tmp_path / folder, adapter=adapter)

    return make


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("full", [False, True])
def test_three_steps_earn_rewards_and_change_the_weights(stage: Stage, tmp_path: Path, full: bool) -> None:
    run = stage(steps=3, full=full, learning_rate=1e-3 if full else 1e-2)
    before = weights(run)
    assert all("lora_" in name for name in before) is not full
    run.train()
    after = weights(run)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert any(row["format_rate"] > 0 for row in rows)
    for name in ("reward", "format_rate", "accuracy", "tokens", "loss", "said_safe", "length_reward"):
        assert all(name in row for row in rows), name
    assert "held_out_missed_harm" in rows[0]
    assert {"held_out_false_positives", "held_out_format_rate", "held_out_accuracy"} <= rows[1].keys()
    assert (tmp_path / "run" / "curves.png").exists()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    folder = run.save()
    saved = load_base(folder)[0] if full else None
    assert (folder / "adapter_model.safetensors").exists() is not full
    assert saved is None or any(
        torch.equal(parameter, after[name]) and not torch.equal(parameter, before[name])
        for name, parameter in saved.named_parameters()
    )
    run.finish()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_prompt_that_is_computed_once_gives_tokens_and_weights_what_trl_gives_them(stage: Stage) -> None:
    from trl import GRPOTrainer  # type: ignore[attr-defined]

    trainer = stage().trainer
    model = trainer.model
    torch.manual_seed(0)
    long, short = torch.randint(3, 200, (1, 12)), torch.randint(3, 200, (1, 7))
    none = torch.zeros(1, 5, dtype=torch.long)
    prompts = torch.cat([long, torch.cat([none, short], 1), long, torch.cat([none, short], 1)])
    seen = torch.ones_like(prompts)
    seen[1::2, :5] = 0
    completions, mask = torch.randint(3, 200, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[0, 6:] = mask[3, 4:] = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)

    def computed(score: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model.zero_grad()
        ids, attention = torch.cat([prompts, completions], 1), torch.cat([seen, mask], 1)
        logps, entropies, _ = score(trainer, model, ids, attention, 9, compute_entropy=True)
        (logps * mask).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return (logps * mask).detach(), (entropies * mask).detach(), gradient

    ours = computed(type(trainer)._get_per_token_logps_and_entropies)
    theirs = computed(GRPOTrainer._get_per_token_logps_and_entropies)
    assert (
        type(trainer)._get_per_token_logps_and_entropies is not GRPOTrainer._get_per_token_logps_and_entropies
    )
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_gradient_may_stop_at_the_prompt(stage: Stage) -> None:
    prompt, completions = torch.randint(3, 200, (12,)), torch.randint(3, 200, (4, 9))
    scores, gradients = [], []
    for through in (True, False):
        trainer = stage(through_prompt=through).trainer
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        logps, _ = trainer._score_completions(
            trainer.model, prompt, completions, torch.ones_like(completions)
        )
        logps.sum().backward()
        scores.append(logps.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*scores)
    assert gradients[1].abs().max() > 0.01
    assert not torch.allclose(*gradients, rtol=1e-2)


def test_the_loss_can_be_computed_in_bfloat16(stage: Stage) -> None:
    prompt, completions = torch.randint(3, 200, (12,)), torch.randint(3, 200, (4, 9))
    exact, rounded = (
        trainer._score_completions(trainer.model, prompt, completions, torch.ones_like(completions))[0]
        for trainer in (stage(dtype=dtype).trainer for dtype in (None, "bfloat16"))
    )
    torch.testing.assert_close(exact, rounded.float(), rtol=0.05, atol=0.05)
    assert not torch.equal(exact, rounded.float())


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_prompt_that_is_computed_once_is_completed_as_trl_does(stage: Stage, penalty: float) -> None:
    from trl import GRPOTrainer  # type: ignore[attr-defined]

    # Nearly without chance, and longer than what room is made for at once.
    run = stage(temperature=1e-6, top_p=0.9, repetition_penalty=penalty, max_tokens=150)
    asked = [run.tokenizer(run.prompt(Policy.load("rsafe-18"), item))["input_ids"] for item in ITEMS[8:11]]
    prompts = [asked[0]] * 3 + [asked[1]] + [asked[2]] * 2
    ours, theirs = (
        trainer._generate_single_turn(run.trainer, prompts, None, {}, 1)[0]
        for trainer in (type(run.trainer), GRPOTrainer)
    )
    assert type(run.trainer)._generate_single_turn is not GRPOTrainer._generate_single_turn
    assert ours == theirs
    assert ours[0] == ours[1] == ours[2]
    assert max(map(len, ours)) > 8


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_tokens_are_drawn_as_the_settings_say(stage: Stage, spread: float) -> None:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    trainer = stage(temperature=0.8, top_p=0.9).trainer
    torch.manual_seed(0)
    logits = spread * torch.randn(1, 2000)
    seen = torch.zeros(1, 1, dtype=torch.long)
    wanted = TopPLogitsWarper(0.9)(seen, TemperatureLogitsWarper(0.8)(seen, logits)).softmax(-1)[0]  # type: ignore[arg-type]
    draws = 20_000
    drawn = trainer._drawn(seen.expand(draws, 1), logits.expand(draws, -1))
    found = torch.bincount(drawn, minlength=2000) / draws
    assert not found[wanted == 0].any()
    assert (found - wanted).abs().sum() < 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)


def test_the_papers_recipe_runs_on_a_small_base(speaking_base: Path, template: Path, tmp_path: Path) -> None:
    from rsafe_plugins.alignment.grpo import GRPO

    smaller = {
        "base": str(speaking_base),
        "rollouts": "transformers",
        "batch": 2,
        "max_tokens": 40,
        "steps": 1,
    }
    settings = load_recipe(GRPOSettings, "rsafe-7b", smaller)
    run = GRPO(speaking_base, GuardPrompt(template), settings, ITEMS, ITEMS[:4], tmp_path / "run")
    before = weights(run)
    run.train()
    (row,) = log_of(tmp_path / "run")
    assert row.keys() >= {"kl", "reward", "held_out_missed_harm"}
    assert len(weights(run)) == len(before) > 0
    assert not any("lora" in name for name in before)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_that_died_goes_on_as_if_it_had_not(stage: Stage, tmp_path: Path, goes_on: bool) -> None:
    changed: dict[str, Any] = {"kl": 0.1} if goes_on else {}
    adapter = None
    if goes_on:
        first = stage("first", steps=1)
        first.train()
        adapter = first.save()
    stage("whole", adapter, **changed).train()

    def die(step: int, reward: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage("parts", adapter, **changed).train(die)
    second = stage("parts", adapter, **changed)
    second.train()
    whole, parts = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    for name in ("loss", "reward", "grad_norm", "tokens", "accuracy", *(["kl"] if goes_on else [])):
        assert [row[name] for row in parts] == [row[name] for row in whole], name
    assert any(row["loss"] for row in whole[2:])


def test_a_run_that_died_does_not_go_on_with_other_settings(stage: Stage) -> None:
    def die(step: int, reward: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage().train(die)
    with pytest.raises(AlignmentError, match="another learning_rate"):
        stage(learning_rate=1e-5).train()


def test_rollouts_begin_with_what_the_guards_engine_is_given(stage: Stage, template: Path) -> None:
    run = stage()
    policy = Policy.load("rsafe-18")
    messages = GuardPrompt(template).messages(policy, ITEMS[0].content())
    asked = encode(run.tokenizer, Request(messages=messages, prefill="<think>"), 4096)
    assert tuple(run.tokenizer(run.prompt(policy, ITEMS[0]))["input_ids"]) == asked.tokens
    rows = [run.trainer.train_dataset[index] for index in (0, 2)]
    assert all(row["prompt"].endswith("<|im_start|>assistant\n<think>") for row in rows)


def test_the_time_limit_ends_training(stage: Stage, tmp_path: Path) -> None:
    stage(minutes=1e-9, evaluate_items=0).train()
    assert len(log_of(tmp_path / "run")) == 1


def test_what_was_trained_until_the_time_was_up_is_kept_where_it_cannot_be_written(
    stage: Stage, tmp_path: Path
) -> None:
    run = stage(minutes=1e-9, evaluate_items=0)
    run.train()
    (tmp_path / "run" / "adapter").write_text("a file")
    with pytest.raises(AlignmentError, match="adapter can't be written"):
        run.save()
    assert [folder.name for folder in run.checkpoints.glob("checkpoint-*")] == ["checkpoint-1"]
    (tmp_path / "run" / "adapter").unlink()
    again = stage(minutes=1e-9, evaluate_items=0)
    again.train()
    assert again.save().is_dir()
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2], "it went on from there"


@pytest.mark.parametrize(
    ("changed", "rows"), [({"steps": 2, "evaluate_every": 1}, 2), ({"minutes": 1e-9}, 1)]
)
def test_what_was_measured_before_the_first_step_is_kept(
    stage: Stage, tmp_path: Path, changed: dict[str, Any], rows: int
) -> None:
    run = stage(**changed)
    measured = iter(range(1, 10))
    run.held_out.measure = lambda *_: {"held_out_accuracy": float(next(measured))}
    run.train()
    log = log_of(tmp_path / "run")
    assert [row["held_out_accuracy"] for row in log] == [2.0, 3.0][:rows]
    assert [row.get("before_held_out_accuracy") for row in log] == [1.0, None][:rows]


def test_the_share_of_groups_that_earned_the_same_is_of_groups(stage: Stage, tmp_path: Path) -> None:
    run = stage(steps=1, evaluate_items=0, scale="batch", collapse_window=5)
    size, count = run.settings.group_size, run.settings.batch
    earned = [1.0] * size * (count - 1) + [float(n % 2) for n in range(size)]

    def accuracy(completions: list[str], **_: Any) -> list[float]:
        return earned[: len(completions)]

    def nothing(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    run.trainer.reward_funcs = [accuracy, *([nothing] * (len(run.trainer.reward_funcs) - 1))]
    run.train()
    assert log_of(tmp_path / "run")[0]["groups_alike"] == pytest.approx(1 - 1 / count)


def test_weights_that_are_no_numbers_stop_training(stage: Stage) -> None:
    run = stage(evaluate_items=0)
    for name, parameter in run.trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(AlignmentError, match="probabilities at step 1 are no numbers"):
        run.train()


def test_a_guard_that_never_answers_in_the_form_stops_training(stage: Stage) -> None:
    with pytest.raises(AlignmentError, match="No completion of the last 2 steps"):
        stage(max_tokens=8, collapse_window=2, evaluate_items=0).train()


def test_a_batch_that_does_not_share_out_is_refused(stage: Stage) -> None:
    with pytest.raises(AlignmentError, match="parts of micro_batch 7"):
        stage(micro_batch=7)


def test_vllm_does_not_sample_from_a_gguf_file(template: Path, tmp_path: Path) -> None:
    from rsafe_plugins.alignment.grpo import GRPO

    settings = GRPOSettings.model_validate({**SETTINGS, "rollouts": "vllm"})
    with pytest.raises(AlignmentError, match="samples from a Hugging Face folder"):
        GRPO("model.gguf", GuardPrompt(template), settings, ITEMS, [], tmp_path)


def test_the_command_leaves_an_adapter_for_llama_cpp_and_what_reproduces_it(
    speaking_base: Path, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, recipe, out = tmp_path / "data.jsonl", tmp_path / "mine.yaml", tmp_path / "run"
    rows = [item.model_dump() | {"id": f"{copy}-{item.id}"} for item in ITEMS for copy in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(json.dumps({**SETTINGS, "steps": 3}))
    command = ["align", "--stage", "grpo", str(data), "--recipe", str(recipe), "--base", str(speaking_base)]
    options = ["--template", str(template), "--out", str(out), "--held-out", "4", "--json"]
    assert main([*command, *options, "--set", "steps=1", "--seed", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "run.json").read_text())
    assert (report["steps"], report["settings"]["seed"], report["settings"]["group_size"]) == (1, 3, 4)
    settings = load_recipe(GRPOSettings, recipe, {"steps": 1, "seed": 3, "base": str(speaking_base)})
    assert report["settings"] == settings.model_dump(mode="json")
    assert len(report["sha256"][0]) == 64
    assert report["versions"]["trl"]
    assert Path(report["gguf"]).read_bytes()[:4] == b"GGUF"
    assert report["held_out_before"].keys() == report["held_out_after"].keys() >= {"missed_harm"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stage", "warm-start", "--rollouts", "vllm"], "--rollouts is for the stage grpo"),
        (["--stage", "warm-start", "--set", "group_size=4"], "group_size, which there is not"),
        (
            ["--stage", "warm-start", "--recipe", "rsafe-7b"],
            "one of embedded, embedded-categories, and there is no rsafe-7b",
        ),
        (["--stage", "warm-start", "--by-category", "--template", "t.txt"], "leave --template out"),
        (["--stage", "grpo", "--stop-at-policy"], "is for the stage warm-start"),
        (["--stage", "grpo", "--set", "steps"], "--set NAME=VALUE"),
        (["--stage", "grpo", "--set", "stepps=1"], "stepps, which there is not"),
    ],
)
def test_options_that_cannot_be_used_are_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["align", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), *options]) == 2
    printed = capsys.readouterr()
    assert says in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
