import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rsafe_plugins.alignment.export import ExportError, export_gguf, export_merged
from rsafe_plugins.alignment.recipe import WarmStartSettings
from rsafe_plugins.alignment.warm_start import WarmStart
from rsafe_plugins.guard.prompt import GuardPrompt

pytestmark = pytest.mark.align


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> WarmStart:
    warm = WarmStart(tiny_base, GuardPrompt(), WarmStartSettings(rank=4), tmp_path)
    for name, parameter in warm.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return warm


def test_the_file_holds_every_tensor_under_llama_cpps_names(trained: WarmStart, tmp_path: Path) -> None:
    import gguf

    path = export_gguf(trained.save(), trained.base_config, tmp_path / "a.gguf", name="tiny")
    reader = gguf.GGUFReader(str(path))
    names = {tensor.name for tensor in reader.tensors}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert names == {
        f"blk.{n}.{part}.weight.lora_{side}" for n in range(2) for part in parts for side in "ab"
    }
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert reader.fields["general.type"].contents() == "adapter"


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_only_queries_and_keys_are_reordered_and_head_by_head(
    trained: WarmStart, tmp_path: Path, architecture: str
) -> None:
    written, state = exported(trained, tmp_path, architecture)
    assert (written["blk.0.attn_v.weight.lora_b"] == state["self_attn.v_proj", "B"]).all()
    assert (written["blk.0.attn_q.weight.lora_a"] == state["self_attn.q_proj", "A"]).all()
    # Four heads of eight rows: within a head, row i of its first half is followed by row i of its second.
    order = [8 * head + half * 4 + row for head in range(4) for row in range(4) for half in range(2)]
    assert (written["blk.0.attn_q.weight.lora_b"] == state["self_attn.q_proj", "B"][order]).all()
    assert (written["blk.0.attn_k.weight.lora_b"] == state["self_attn.k_proj", "B"][order[:16]]).all()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])
def test_nothing_is_reordered_where_llama_cpp_pairs_halves_too(
    trained: WarmStart, tmp_path: Path, architecture: str
) -> None:
    written, state = exported(trained, tmp_path, architecture)
    assert (written["blk.0.attn_q.weight.lora_b"] == state["self_attn.q_proj", "B"]).all()
    assert (written["blk.0.attn_k.weight.lora_b"] == state["self_attn.k_proj", "B"]).all()


def exported(
    trained: WarmStart, folder: Path, architecture: str
) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """The tensors written for a base of an architecture, and those of the first layer as they were trained."""
    import gguf

    config = {**trained.base_config, "model_type": architecture}
    path = export_gguf(trained.save(), config, folder / "a.gguf", name="tiny")
    written = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(path)).tensors}
    found = (
        (re.search(r"layers\.0\.(.+)\.lora_([AB])", name), p) for name, p in trained.model.named_parameters()
    )
    state = {(at[1], at[2]): p.detach().numpy().astype(np.float16) for at, p in found if at}
    return written, state


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="saved PEFT adapter"):
        export_gguf(tmp_path, {"model_type": "llama", "num_hidden_layers": 1}, tmp_path / "a.gguf", name="x")


def test_an_adapter_that_is_damaged_is_refused(trained: WarmStart, tmp_path: Path) -> None:
    folder = trained.save()
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ExportError, match="saved PEFT adapter"):
        export_gguf(folder, trained.base_config, tmp_path / "a.gguf", name="x")


def test_another_kind_of_adapter_is_refused(trained: WarmStart, tmp_path: Path) -> None:
    folder = trained.save()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ExportError, match="IA3"):
        export_gguf(folder, trained.base_config, tmp_path / "a.gguf", name="x")


@pytest.mark.parametrize("option", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}])
def test_a_scale_that_gguf_has_no_form_for_is_refused(
    trained: WarmStart, tmp_path: Path, option: dict[str, object]
) -> None:
    folder = trained.save()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **option}))
    with pytest.raises(ExportError, match=f"trained with {next(iter(option))}: export it merged"):
        export_gguf(folder, trained.base_config, tmp_path / "a.gguf", name="x")


def test_an_architecture_whose_order_is_not_known_is_refused(trained: WarmStart, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'abacus' in llama\.cpp isn't known"):
        export_gguf(
            trained.save(), {"model_type": "abacus", "num_hidden_layers": 2}, tmp_path / "a.gguf", name="x"
        )


def test_a_merged_folder_is_the_trained_model_without_peft(
    trained: WarmStart, tiny_base: Path, tmp_path: Path
) -> None:
    merged = export_merged(trained.save(), tiny_base, tmp_path / "merged")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        expected = trained.model.eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - base).abs().max() > 0.1
    assert {path.name for path in merged.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    chat = [{"role": "user", "content": "hi"}]
    first, second = (AutoTokenizer.from_pretrained(path) for path in (merged, tiny_base))
    assert first.apply_chat_template(chat) == second.apply_chat_template(chat)


def test_merged_weights_are_stored_as_precisely_as_the_base(
    trained: WarmStart, tiny_base: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(half)
    AutoModelForCausalLM.from_pretrained(tiny_base).to(torch.bfloat16).save_pretrained(half)
    for base, dtype in ((tiny_base, torch.float32), (half, torch.bfloat16)):
        merged = export_merged(trained.save(), base, tmp_path / f"merged {dtype}")
        assert {one.dtype for one in AutoModelForCausalLM.from_pretrained(merged).parameters()} == {dtype}


@pytest.mark.parametrize("what", ["no adapter", "no JSON", "another kind", "no base", "another base"])
def test_what_cannot_be_merged_is_one_sentence_and_no_folder_that_loads(
    trained: WarmStart, tiny_base: Path, tmp_path: Path, what: str
) -> None:
    folder = trained.save()
    config = folder / "adapter_config.json"
    base = tiny_base
    if what == "no adapter":
        config.unlink()
    elif what == "no JSON":
        config.write_text("{")
    elif what == "another kind":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    elif what == "no base":
        base = tmp_path / "nowhere"
    else:
        base = tmp_path / "wider"
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
        wider = LlamaConfig.from_pretrained(tiny_base, hidden_size=64)
        LlamaForCausalLM(wider).save_pretrained(base)
    out = tmp_path / "merged"
    with pytest.raises(ExportError, match=r"\.$") as raised:
        export_merged(folder, base, out)
    assert "\n" not in str(raised.value)
    assert not (out / "config.json").exists()
