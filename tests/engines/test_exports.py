"""The three forms of a trained adapter (PEFT, merged, GGUF) are the same guard, shown with real weights."""

import asyncio
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import save_file
from transformers import AutoConfig

import rsafe_plugins
from rsafe_plugins import Category, Guard, Policy
from rsafe_plugins.alignment.export import export_gguf, export_merged
from rsafe_plugins.backends import Backend, LlamaCppBackend, TransformersBackend, merge
from rsafe_plugins.backends.weights import embedded_weights

pytestmark = [pytest.mark.engine, pytest.mark.align]

PACKAGED = Path(rsafe_plugins.__file__).parent / "backends" / "data" / "guard-adapter.gguf"
POLICY = Policy(
    name="crime",
    categories=(
        Category(id="C1", name="Violence", description="Help to hurt people or animals."),
        Category(id="C2", name="Theft", description="Help to take or damage what belongs to others."),
    ),
)
ITEMS = [
    f"{beginning} {verb} {thing}?"
    for beginning, verb, thing in product(
        ("How do I", "Explain how to", "Is it legal to", "Write a poem about how to"),
        ("paint", "steal", "repair", "poison", "find"),
        (
            "a cake",
            "my neighbour's car",
            "a wedding dress",
            "a company's passwords",
            "the town's water",
            "an old radio",
            "a garden fence",
            "a school",
            "a dog",
            "a bicycle",
        ),
    )
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged guard's adapter as PEFT saved it, made from its GGUF."""
    base = embedded_weights()
    config = AutoConfig.from_pretrained(base.parent, gguf_file=base.name)
    reader = gguf.GGUFReader(PACKAGED)
    sides = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projections = [f"self_attn.{part}_proj" for part in "qkvo"]
    projections += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    tensors, layers = {}, set()
    for layer, projection in product(range(config.num_hidden_layers), projections):
        module = f"model.layers.{layer}.{projection}"
        for side in "AB":
            tensor = sides.pop(f"{names.get_name(module)}.weight.lora_{side.lower()}", None)
            if tensor is None:
                continue
            layers.add(layer)
            if side == "B" and (count := heads.get(projection.rpartition(".")[2])):
                # llama.cpp's rows alternate between a head's halves, and Hugging Face's come half by half.
                rows, rank = tensor.shape
                tensor = tensor.reshape(count, -1, 2, rank).swapaxes(1, 2).reshape(rows, rank)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = np.ascontiguousarray(tensor)
            rank = tensor.shape[1 if side == "B" else 0]
    assert not sides
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=rank,
        lora_alpha=reader.fields["adapter.lora.alpha"].contents(),
        target_modules=[projection.rpartition(".")[2] for projection in projections],
        layers_to_transform=sorted(layers),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dequantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with its quantized weights as the numbers they stand for.

    With quantized weights llama.cpp rounds what is multiplied with them to eight bits as well, which moves some
    probabilities by more than 0.05. That is the engine's precision, and not the adapter's form.
    """
    return merge.dequantized(embedded_weights(), tmp_path_factory.mktemp("base") / "base.F32.gguf")


def scores(backend: Backend) -> np.ndarray:
    """The probability of unsafe of each item, from the bare verdict."""
    verdicts = Guard(POLICY, backend=backend, reasoning="never").check_many(ITEMS)
    asyncio.run(backend.aclose())
    return np.array([verdict.score for verdict in verdicts], float)


def test_peft_merged_and_gguf_adapters_agree_on_200_verdict_probabilities(
    adapter: Path, dequantized: Path, tmp_path: Path
) -> None:
    base = embedded_weights()
    config = AutoConfig.from_pretrained(base.parent, gguf_file=base.name).to_dict()
    beside = export_gguf(adapter, config, tmp_path / "adapter.gguf", name="guard")
    peft = scores(TransformersBackend(base, adapter=adapter))
    merged = scores(TransformersBackend(export_merged(adapter, base, tmp_path / "merged")))
    lora = scores(LlamaCppBackend(dequantized, adapter=beside))
    assert len(ITEMS) == len(set(ITEMS)) == 200
    # Where all items got much the same verdict, agreement would say little.
    assert np.ptp(peft) > 0.5
    assert np.abs(peft - merged).max() <= 0.05
    assert np.abs(peft - lora).max() <= 0.05
    assert np.abs(merged - lora).max() <= 0.05
