"""Guards in the form that another engine reads: a PEFT LoRA adapter as GGUF, a GGUF model as a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from rsafe_plugins.errors import RSafeError

Array = NDArray[Any]

# Rows of these projections are reordered in llama.cpp's files of this architecture (its rotary embedding pairs
# neighbours, Hugging Face's pairs halves), so the adapter's output side has to be reordered the same way.
_REORDERED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class ExportError(RSafeError, ValueError):
    """An adapter can't be written in the wanted form."""


def export_gguf(adapter: str | Path, base_config: Mapping[str, Any], out: str | Path, *, name: str) -> Path:
    """Writes the adapter in half precision.

    Args:
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base_config: The base's configuration: `model_type`, `num_hidden_layers`, and its numbers of heads.
        out: The file to write.
        name: What the adapter calls itself in its metadata.

    Returns:
        The path written.

    Raises:
        ExportError: The folder holds no LoRA adapter, or one for an architecture that llama.cpp doesn't name.
    """
    folder = Path(adapter)
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(str(folder / "adapter_model.safetensors"))
    except OSError as error:
        raise ExportError(f"{folder} must hold a saved PEFT adapter: {error}.") from error
    if config.get("peft_type") != "LORA":
        raise ExportError(f"Only a LoRA adapter can be exported; {folder} holds {config.get('peft_type')}.")
    architecture = str(base_config["model_type"])
    names = _names(architecture, int(base_config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(str(out), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, tensor in sorted(tensors.items()):
        found = _TENSOR.fullmatch(key)
        target = names.get_name(found["module"]) if found else None
        if found is None or target is None:
            raise ExportError(
                f"{folder} holds the tensor {key}, which has no place in a {architecture} model."
            )
        if found["side"] == "B":
            tensor = _reorder(tensor, found["module"].rsplit(".", 1)[-1], base_config)
        writer.add_tensor(f"{target}.weight.lora_{found['side'].lower()}", tensor.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(out)


def export_folder(weights: str | Path, out: str | Path) -> Path:
    """Writes a GGUF model as a Hugging Face folder, in safetensors, for engines that read no such GGUF.

    Args:
        weights: The GGUF file; quantized weights are written as what they stand for.
        out: The folder to write.

    Returns:
        The path written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(weights)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where)
    del model.config.quantization_config
    model.hf_quantizer = None
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    # Last, since its config.json is what shows that the folder is whole.
    model.save_pretrained(out)
    return Path(out)


def _names(architecture: str, layers: int) -> gguf.TensorNameMap:
    for arch, known in gguf.MODEL_ARCH_NAMES.items():
        if known == architecture:
            return gguf.get_tensor_name_map(arch, layers)
    raise ExportError(f"llama.cpp has no architecture named {architecture!r}.")


def _reorder(tensor: Array, projection: str, base_config: Mapping[str, Any]) -> Array:
    """The output side of a projection, (out, rank), with the rows of each head in llama.cpp's order."""
    key = _REORDERED.get(str(base_config["model_type"]), {}).get(projection)
    if key is None:
        return tensor
    heads = int(base_config[key])
    rows, rank = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)
