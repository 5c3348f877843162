"""Guards in the form that another engine reads: a PEFT LoRA adapter as GGUF, or merged into a Hugging Face folder."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rsafe_plugins.errors import BackendUnavailable, RSafeError

Array = NDArray[Any]

# Rows of these projections are reordered in llama.cpp's files of some architectures (its rotary embedding pairs
# neighbours there, Hugging Face's pairs halves), so the adapter's output side has to be reordered the same way. Of an
# architecture that isn't named here nobody has looked it up, and a wrong order is an adapter that does harm unseen.
_PAIRED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_REORDERED: Mapping[str, Mapping[str, str]] = {
    "llama": _PAIRED,
    "granite": _PAIRED,
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
}
_MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_GGUF_TENSOR = re.compile(r"(?P<target>.+)\.weight\.lora_(?P<side>[ab])")
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
        ExportError: The folder holds no LoRA adapter, one that GGUF has no form for, or one for an architecture
            whose form in llama.cpp isn't known here.
    """
    folder = Path(adapter)
    config = _lora_config(folder)
    try:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder} must hold a saved PEFT adapter: {error}.") from error
    for option in ("use_rslora", "alpha_pattern"):
        if config.get(option):
            raise ExportError(
                f"A GGUF adapter has one alpha for all of its tensors, divided by their rank, and {folder} was "
                f"trained with {option}: export it merged."
            )
    architecture = str(base_config["model_type"])
    names = _names(architecture, int(base_config["num_hidden_layers"]))
    partial = Path(out).with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), architecture)
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
        if not (np.abs(tensor) <= np.finfo(np.float16).max).all():
            raise ExportError(
                f"{folder} holds numbers in {key} that float16 has no place for: train at a lower rate."
            )
        writer.add_tensor(f"{target}.weight.lora_{found['side'].lower()}", tensor.astype(np.float16))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ExportError(f"{out} can't be written ({error.strerror or error}).") from error
    return Path(out)


def read_gguf(file: str | Path, base_config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of an adapter that `export_gguf` wrote, in float32, named and ordered as PEFT saves them.

    Raises:
        ExportError: The file can't be read, or is no LoRA adapter of this base.
    """
    try:
        reader = gguf.GGUFReader(str(file))
        found_for = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
        alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ExportError(f"{file} must be a GGUF adapter: {' '.join(str(error).split())}.") from error
    architecture, layers = str(base_config["model_type"]), int(base_config["num_hidden_layers"])
    if architecture not in _REORDERED or found_for != architecture:
        raise ExportError(
            f"{file} is for {found_for}, and the base is {architecture}: give the folder of a PEFT adapter."
        )
    names = _names(architecture, layers)
    modules = {
        names.get_name(f"model.layers.{layer}.{part}"): f"model.layers.{layer}.{part}"
        for layer in range(layers)
        for part in _MODULES
    }
    tensors = {}
    for tensor in reader.tensors:
        found = _GGUF_TENSOR.fullmatch(tensor.name)
        module = modules.get(found["target"]) if found else None
        if found is None or module is None:
            raise ExportError(
                f"{file} holds the tensor {tensor.name}, which is no LoRA's in a {architecture} model."
            )
        data = np.asarray(tensor.data, dtype=np.float32)
        if found["side"] == "a" and alpha != 2 * len(data):
            raise ExportError(
                f"{file} has the alpha {alpha:g} and the rank {len(data)}: ours is twice the rank."
            )
        if found["side"] == "b":
            try:
                data = _reorder(data, module.rsplit(".", 1)[-1], base_config, back=True)
            except ValueError as error:
                raise ExportError(
                    f"{file} isn't for this base: {tensor.name} has {len(data)} rows."
                ) from error
        tensors[f"base_model.model.{module}.lora_{found['side'].upper()}.weight"] = data
    return tensors


def export_merged(adapter: str | Path, base: str | Path, out: str | Path) -> Path:
    """Writes the base with the adapter added to its weights: a folder in safetensors that loads without PEFT.

    They are added in float32, so the base has to fit into memory in it, and stored as precisely as the base is.

    Args:
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: What the adapter was trained on: a Hugging Face name or folder, or a GGUF file, whose quantized weights
            are taken for what they stand for and written in float32.
        out: The folder to write, with tokenizer and chat template.

    Returns:
        The path written.

    Raises:
        ExportError: The folder holds no LoRA adapter, it doesn't go with the base, or the base can't be loaded.
    """
    _lora_config(Path(adapter))
    return _write(base, str(adapter), Path(out))


def export_folder(weights: str | Path, out: str | Path) -> Path:
    """Writes a GGUF model as a Hugging Face folder, in safetensors, for engines that read no such GGUF.

    Args:
        weights: The GGUF file; quantized weights are written as what they stand for, in float32.
        out: The folder to write.

    Returns:
        The path written.

    Raises:
        ExportError: The model can't be loaded.
    """
    return _write(weights, None, Path(out))


def _lora_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} must hold a saved PEFT adapter: {error}.") from error
    if config.get("peft_type") != "LORA":
        raise ExportError(f"Only a LoRA adapter can be exported; {folder} holds {config.get('peft_type')}.")
    return config


def _write(base: str | Path, adapter: str | None, out: Path) -> Path:
    from transformers import AutoConfig

    from rsafe_plugins.backends.causal_lm import load

    try:
        loaded = load(str(base), adapter=adapter, device="cpu", dtype="float32")
    except BackendUnavailable as error:
        raise ExportError(str(error)) from error
    model = loaded.model
    if not str(base).lower().endswith(".gguf"):
        model = model.to(AutoConfig.from_pretrained(str(base)).dtype)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part:
        loaded.tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        # Its config.json is what shows that a folder is whole, so it comes last.
        for path in sorted(Path(part).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)
    return out


def _names(architecture: str, layers: int) -> gguf.TensorNameMap:
    if architecture not in _REORDERED:
        raise ExportError(
            f"The form of an adapter for {architecture!r} in llama.cpp isn't known here, only of one for "
            f"{', '.join(_REORDERED)}: export it merged, and convert that with llama.cpp's own script."
        )
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    return gguf.get_tensor_name_map(arch, layers)


def _reorder(tensor: Array, projection: str, base_config: Mapping[str, Any], *, back: bool = False) -> Array:
    """The output side of a projection, (out, rank), with the rows of each head in llama.cpp's order, or `back`."""
    key = _REORDERED[str(base_config["model_type"])].get(projection)
    if key is None:
        return tensor
    heads = int(base_config[key])
    rows, rank = tensor.shape
    pairs = rows // heads // 2
    shape = (heads, pairs, 2, rank) if back else (heads, 2, pairs, rank)
    return tensor.reshape(shape).swapaxes(1, 2).reshape(rows, rank)
