import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rsafe_plugins.alignment.export import ExportError, export_gguf
from rsafe_plugins.alignment.warm_start import WarmStart, WarmStartSettings
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


def test_only_queries_and_keys_are_reordered_and_head_by_head(trained: WarmStart, tmp_path: Path) -> None:
    import gguf

    path = export_gguf(trained.save(), trained.base_config, tmp_path / "a.gguf", name="tiny")
    written = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(path)).tensors}
    state = {name: p.detach().numpy().astype(np.float16) for name, p in trained.model.named_parameters()}

    def ours(module: str, side: str) -> np.ndarray:
        return next(value for name, value in state.items() if f"layers.0.{module}.lora_{side}" in name)

    assert (written["blk.0.attn_v.weight.lora_b"] == ours("self_attn.v_proj", "B")).all()
    assert (written["blk.0.attn_q.weight.lora_a"] == ours("self_attn.q_proj", "A")).all()
    # Four heads of eight rows: within a head, row i of its first half is followed by row i of its second.
    order = [8 * head + half * 4 + row for head in range(4) for row in range(4) for half in range(2)]
    assert (written["blk.0.attn_q.weight.lora_b"] == ours("self_attn.q_proj", "B")[order]).all()


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="saved PEFT adapter"):
        export_gguf(tmp_path, {"model_type": "llama", "num_hidden_layers": 1}, tmp_path / "a.gguf", name="x")


def test_another_kind_of_adapter_is_refused(trained: WarmStart, tmp_path: Path) -> None:
    folder = trained.save()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ExportError, match="IA3"):
        export_gguf(folder, trained.base_config, tmp_path / "a.gguf", name="x")


def test_an_architecture_that_llama_cpp_does_not_know_is_refused(trained: WarmStart, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'abacus'"):
        export_gguf(
            trained.save(), {"model_type": "abacus", "num_hidden_layers": 2}, tmp_path / "a.gguf", name="x"
        )
