import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rsafe_plugins import Category, Content, Policy
from rsafe_plugins.alignment.examples import Example, PolicyVariant
from rsafe_plugins.alignment.export import ExportError, export_gguf, read_gguf
from rsafe_plugins.alignment.recipe import WarmStartSettings
from rsafe_plugins.alignment.warm_start import BARE_PREFILL, AlignmentError, Encoder, WarmStart
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.prompt import GuardPrompt

pytestmark = pytest.mark.align

POLICY = Policy(name="p", categories=(Category(id="A", name="Theft"), Category(id="B", name="Hate")))
VARIANT = PolicyVariant(POLICY, {"U3": "A", "U7": "B"})
EXAMPLES = [
    Example(Content.prompt("how to steal a car"), "unsafe", ("A",), "It is theft.\nCategories: A"),
    Example(Content.prompt("hi"), "safe", (), None),
    Example(Content.prompt("how to bake a cake with plums"), "safe", (), "Nothing.\nCategories: none"),
]


def stage(base: Path, out: Path, **settings: object) -> WarmStart:
    return WarmStart(base, GuardPrompt(), WarmStartSettings(micro_batch=2, **settings), out)  # type: ignore[arg-type]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first_layer", [0, 1])
def test_sharing_the_policy_part_gives_the_gradient_of_whole_sequences(
    tiny_base: Path, tmp_path: Path, first_layer: int
) -> None:
    warm = stage(tiny_base, tmp_path, first_layer=first_layer)
    for name, parameter in warm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = warm.step(VARIANT, EXAMPLES)
    shared_gradients = gradients(warm.model)
    warm.model.zero_grad()
    shared, sequences = warm.encoder.encode(VARIANT, EXAMPLES)
    whole = torch.zeros(())
    for sequence in sequences:
        for tokens, weights in sequence.endings:
            start = len(shared) + len(sequence.prompt)
            logits = warm.model(input_ids=torch.tensor([shared + sequence.prompt + tokens])).logits[
                0, start:-1
            ]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
            whole = whole + (losses * torch.tensor(weights[1:])).sum() / len(sequences)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4)
    expected = gradients(warm.model)
    assert shared_gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(shared_gradients[name], gradient, rtol=1e-3, atol=1e-6), name


def test_training_lowers_the_loss_changes_the_adapter_and_keeps_a_log(
    tiny_base: Path, tmp_path: Path
) -> None:
    warm = stage(tiny_base, tmp_path, learning_rate=5e-3, warmup_steps=1)
    warm.train([(VARIANT, EXAMPLES)] * 12, total=36 * 2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["seen"] == 36
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    folder = warm.save()
    from safetensors.torch import load_file

    tensors = load_file(str(folder / "adapter_model.safetensors"))
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize("form", ["a folder for PEFT", "a file for llama.cpp"])
def test_training_goes_on_from_an_adapter(tiny_base: Path, tmp_path: Path, form: str) -> None:
    first = stage(tiny_base, tmp_path / "first", learning_rate=5e-3, warmup_steps=1)
    first.train([(VARIANT, EXAMPLES)] * 2, total=12)
    adapter = first.save()
    if "file" in form:
        adapter = export_gguf(adapter, first.base_config, tmp_path / "adapter.gguf", name="tiny")
    went_on = WarmStart(
        tiny_base, GuardPrompt(), WarmStartSettings(micro_batch=2), tmp_path / "second", adapter=adapter
    )
    assert went_on.step(VARIANT, EXAMPLES) == pytest.approx(first.step(VARIANT, EXAMPLES), rel=1e-4)
    assert any(gradient.abs().max() > 0 for gradient in gradients(went_on.model).values())


def going_on(base: Path, adapter: Path, out: Path, **settings: object) -> WarmStart:
    chosen = WarmStartSettings(micro_batch=2, warmup_steps=1, **settings)  # type: ignore[arg-type]
    return WarmStart(base, GuardPrompt(), chosen, out, adapter=adapter)


def test_what_is_distilled_whole_has_no_gradient_until_the_adapter_says_something_else(
    tiny_base: Path, tmp_path: Path
) -> None:
    first = stage(tiny_base, tmp_path / "first", learning_rate=5e-3, warmup_steps=1)
    first.train([(VARIANT, EXAMPLES)] * 4, total=24)
    adapter = first.save()
    kept = going_on(tiny_base, adapter, tmp_path / "kept", distill={"prompts": 1.0})
    kept.step(VARIANT, EXAMPLES)
    assert max(float(one.abs().max()) for one in gradients(kept.model).values()) < 1e-6
    with torch.no_grad():
        for parameter in kept._trained:
            parameter.add_(0.02)
    kept.model.zero_grad()
    kept.step(VARIANT, EXAMPLES)
    assert max(float(one.abs().max()) for one in gradients(kept.model).values()) > 1e-4


def test_half_distilled_is_the_mean_of_both_gradients(tiny_base: Path, tmp_path: Path) -> None:
    first = stage(tiny_base, tmp_path / "first", learning_rate=5e-3, warmup_steps=1)
    first.train([(VARIANT, EXAMPLES)] * 4, total=24)
    adapter = first.save()
    found = []
    for share in (0.0, 0.5, 1.0):
        warm = going_on(tiny_base, adapter, tmp_path / str(share), distill={"prompts": share, "documents": 1})
        with torch.no_grad():
            for parameter in warm._trained:
                parameter.add_(0.02)
        found.append((warm.step(VARIANT, EXAMPLES), gradients(warm.model)))
    (low, none), (middle, half), (high, whole) = found
    assert middle == pytest.approx((low + high) / 2, rel=1e-4)
    for name, gradient in half.items():
        assert torch.allclose(gradient, (none[name] + whole[name]) / 2, rtol=1e-3, atol=1e-6), name


def test_distilling_goes_on_after_a_run_died_with_the_adapter_that_it_began_with(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsafe_plugins.alignment.warm_start.CHECKPOINT_SECONDS", -1)
    first = stage(tiny_base, tmp_path / "first", learning_rate=5e-3, warmup_steps=1)
    first.train([(VARIANT, EXAMPLES)] * 4, total=24)
    adapter = first.save()
    keep = {"distill": {"prompts": 0.5}, "learning_rate": 5e-3}

    def dying() -> Iterator[tuple[PolicyVariant, list[Example]]]:
        yield from [(VARIANT, EXAMPLES)] * 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        going_on(tiny_base, adapter, tmp_path / "parts", **keep).train(dying(), total=15)
    second = going_on(tiny_base, adapter, tmp_path / "parts", **keep)
    second.train([(VARIANT, EXAMPLES)] * 4, total=15)
    whole = going_on(tiny_base, adapter, tmp_path / "whole", **keep)
    whole.train([(VARIANT, EXAMPLES)] * 4, total=15)
    assert [row["loss"] for row in second.log.rows] == [row["loss"] for row in whole.log.rows]


def test_a_step_whose_kinds_are_not_distilled_is_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    first = stage(tiny_base, tmp_path / "first")
    adapter = first.save()
    plain = going_on(tiny_base, adapter, tmp_path / "plain")
    kept = going_on(tiny_base, adapter, tmp_path / "kept", distill={"responses": 1.0, "documents": 1.0})
    assert kept.step(VARIANT, EXAMPLES) == plain.step(VARIANT, EXAMPLES)
    expected = gradients(plain.model)
    assert all(torch.equal(one, expected[name]) for name, one in gradients(kept.model).items())


def test_distilling_without_an_adapter_to_go_on_from_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="distill needs an adapter"):
        stage(tiny_base, tmp_path, distill={"responses": 0.5})


def test_an_adapter_of_another_shape_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = stage(tiny_base, tmp_path / "first").save()
    settings = WarmStartSettings(rank=8)
    with pytest.raises(AlignmentError, match="has r 16, and this run asks for 8"):
        WarmStart(tiny_base, GuardPrompt(), settings, tmp_path / "second", adapter=folder)
    with pytest.raises(AlignmentError, match="can't be loaded"):
        WarmStart(tiny_base, GuardPrompt(), settings, tmp_path / "second", adapter=tmp_path)
    with pytest.raises(AlignmentError, match="first_layer is 2, and the base has the layers 0 to 1"):
        stage(tiny_base, tmp_path / "second", first_layer=2)


def test_an_adapter_whose_tensors_have_no_place_in_the_base_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = stage(tiny_base, tmp_path / "first").save()
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace("layers", "blocks"): one for name, one in tensors.items()}, weights)
    with pytest.raises(AlignmentError, match="of another base"):
        going_on(tiny_base, folder, tmp_path / "second")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AlignmentError, match="can't be loaded"):
        going_on(tiny_base, folder, tmp_path / "second")


def test_an_adapter_that_is_no_number_or_too_large_for_llama_cpp_is_not_written(
    tiny_base: Path, tmp_path: Path
) -> None:
    warm = stage(tiny_base, tmp_path)
    with torch.no_grad():
        warm._trained[0].fill_(1e6)
    folder = warm.save()
    with pytest.raises(ExportError, match="float16 has no place"):
        export_gguf(folder, warm.base_config, tmp_path / "a.gguf", name="tiny")
    assert not (tmp_path / "a.gguf").exists()
    with torch.no_grad():
        warm._trained[0].fill_(float("inf"))
    with pytest.raises(AlignmentError, match="numbers that are none"):
        warm.save()


def test_a_file_for_llama_cpp_that_is_no_such_adapter_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    first = stage(tiny_base, tmp_path / "first")
    file = export_gguf(first.save(), first.base_config, tmp_path / "adapter.gguf", name="tiny")
    settings = WarmStartSettings(rank=8)
    with pytest.raises(AlignmentError, match=r"of another rank.*asks for \(rank 8\)"):
        WarmStart(tiny_base, GuardPrompt(), settings, tmp_path / "second", adapter=file)
    for change in ({"model_type": "qwen2"}, {"num_attention_heads": 5}):
        with pytest.raises(ExportError, match=r"for llama, and the base is qwen2|isn't for this base"):
            read_gguf(file, {**first.base_config, **change})
    config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "first" / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": 8})
    )
    other = export_gguf(tmp_path / "first" / "adapter", first.base_config, tmp_path / "b.gguf", name="tiny")
    with pytest.raises(AlignmentError, match="alpha 8 and the rank 16"):
        WarmStart(tiny_base, GuardPrompt(), WarmStartSettings(), tmp_path / "second", adapter=other)
    file.write_bytes(b"GGUF")
    with pytest.raises(AlignmentError, match="must be a GGUF adapter"):
        WarmStart(tiny_base, GuardPrompt(), settings, tmp_path / "second", adapter=file)


def test_bfloat16_trains_the_same_adapter_less_precisely(tiny_base: Path, tmp_path: Path) -> None:
    exact, fast = (stage(tiny_base, tmp_path / name, dtype=name) for name in ("float32", "bfloat16"))
    assert fast.step(VARIANT, EXAMPLES) == pytest.approx(exact.step(VARIANT, EXAMPLES), rel=0.05)
    assert {one.dtype for one in fast.model.parameters()} == {torch.float32, torch.bfloat16}
    assert {one.dtype for one in fast.model.parameters() if one.requires_grad} == {torch.float32}
    # A rounded frequency would train the adapter for other positions than it is used at.
    assert {one.dtype for one in fast.model.buffers()} == {torch.float32}
    fast.train([(VARIANT, EXAMPLES)] * 2, total=12)
    assert all(torch.isfinite(one).all() for one in fast.model.parameters())


def test_the_same_seed_trains_the_same_adapter(tiny_base: Path, tmp_path: Path) -> None:
    losses = []
    for run in ("a", "b"):
        warm = stage(tiny_base, tmp_path / run, warmup_steps=1)
        warm.train([(VARIANT, EXAMPLES)] * 3, total=18)
        losses.append([row["loss"] for row in warm.log.rows])
    assert losses[0] == losses[1]


def test_a_run_that_died_goes_on_as_if_it_had_not(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsafe_plugins.alignment.warm_start.CHECKPOINT_SECONDS", -1)
    whole = stage(tiny_base, tmp_path / "whole")
    whole.train([(VARIANT, EXAMPLES)] * 5, total=15)

    def dying() -> Iterator[tuple[PolicyVariant, list[Example]]]:
        yield from [(VARIANT, EXAMPLES)] * 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tiny_base, tmp_path / "parts").train(dying(), total=15)
    second = stage(tiny_base, tmp_path / "parts")
    second.train([(VARIANT, EXAMPLES)] * 5, total=15)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole.log.rows]
    second.save()
    second.finish()
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_a_run_that_died_does_not_go_on_with_other_settings(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsafe_plugins.alignment.warm_start.CHECKPOINT_SECONDS", -1)

    def dying() -> Iterator[tuple[PolicyVariant, list[Example]]]:
        yield VARIANT, EXAMPLES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tiny_base, tmp_path).train(dying(), total=15)
    with pytest.raises(AlignmentError, match="another learning_rate"):
        stage(tiny_base, tmp_path, learning_rate=1e-5).train([(VARIANT, EXAMPLES)], total=15)


def test_stopping_at_the_policy_leaves_the_loss_as_it_is_and_another_gradient(
    tiny_base: Path, tmp_path: Path
) -> None:
    losses, found = [], []
    for through in (True, False):
        warm = stage(tiny_base, tmp_path, through_policy=through)
        losses.append(warm.step(VARIANT, EXAMPLES))
        found.append(gradients(warm.model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found[0].keys() == found[1].keys()
    assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0])


def test_the_time_limit_ends_training(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path, minutes=1e-9)
    warm.train([(VARIANT, EXAMPLES)] * 5, total=100)
    assert len(warm.log.rows) == 0


def test_a_loss_that_is_no_number_stops_training(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path)
    for name, parameter in warm.model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(AlignmentError, match="loss at step 0 is nan"):
        warm.train([(VARIANT, EXAMPLES)], total=3)


def test_the_trained_text_is_the_guards_own_prompt(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path)
    shared, sequences = warm.encoder.encode(VARIANT, EXAMPLES)
    (message,) = GuardPrompt().messages(POLICY, EXAMPLES[0].content)
    text = warm.tokenizer.decode(shared + sequences[0].prompt)
    assert text == f"<|im_start|>user\n{message.content}<|im_end|>\n<|im_start|>assistant\n"
    endings = [warm.tokenizer.decode(tokens) for tokens, _ in sequences[0].endings]
    assert endings == [
        "\\boxed{unsafe}\nCategories: A<|im_end|>",
        "<think>It is theft.\nCategories: A</think>\n\\boxed{unsafe}<|im_end|>",
    ]


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="nowhere"):
        stage(tmp_path / "nowhere", tmp_path)


def test_categories_are_taught_after_the_tokens_that_the_guard_asks_with(
    tiny_base: Path, tmp_path: Path
) -> None:
    joined = AutoTokenizer.from_pretrained(tiny_base)
    state = json.loads(joined.backend_tokenizer.to_str())
    state["model"]["vocab"]["}Ċ"] = len(state["model"]["vocab"])
    state["model"]["merges"] = [["}", "Ċ"]]
    state["pre_tokenizer"]["use_regex"] = False  # which would part them
    joined._tokenizer = Tokenizer.from_str(json.dumps(state))
    settings = WarmStartSettings(category_weight=0.5)
    _, (sequence,) = Encoder(joined, GuardPrompt(), settings).encode(VARIANT, EXAMPLES[:1])
    tokens, weights = sequence.endings[0]
    naming = joined("\\boxed{unsafe}\nCategories:", add_special_tokens=False)["input_ids"]
    assert "}Ċ" in joined.convert_ids_to_tokens(naming)
    assert tokens[: len(naming)] == naming
    verdict = len(joined(BARE_PREFILL, add_special_tokens=False)["input_ids"])
    assert weights[verdict] == 1
    assert sum(weights) == pytest.approx(1 + 0.05 + 0.5)


def test_no_more_of_an_item_is_taught_than_the_guard_is_shown(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path, max_prompt_tokens=10, max_response_tokens=20)
    long = {"id": "1", "label": "safe", "prompt": "p" * 50}
    prompt = warm.encoder.shortened(LabelledItem.model_validate({**long, "task": "prompt"}))
    assert prompt.prompt == "p" * 10
    answer = {**long, "task": "response", "response": "r" * 50}
    response = warm.encoder.shortened(LabelledItem.model_validate(answer))
    assert (response.prompt, response.response) == ("p" * 10, "r" * 20)
    assert warm.encoder.shortened(response) == response


def test_a_long_content_is_cut_in_training_only(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path, max_prompt_tokens=10)
    long = Example(Content.prompt("x" * random.Random(0).randint(500, 600)), "safe", (), None)
    shared, sequences = warm.encoder.encode(VARIANT, [long])
    assert warm.tokenizer.decode(shared + sequences[0].prompt).count("x" * 10) == 1
