"""Adds a LoRA adapter to a model's weights, in a form that llama.cpp computes fast on a CPU.

A LoRA beside the weights has to be computed for every token, and llama.cpp has much faster kernels for Q8_0 than for
the Q4_1 in which the embedded weights are served. So the embedded guard is merged once, in some seconds, and kept. With
four bits, Q4_0, it would be a fifth faster still, but so rounded a model of this size can't put a thought in words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsafe_plugins.backends.weights import locked_cache, temporary_folder
from rsafe_plugins.errors import BackendUnavailable


def merged_weights(model: Path, adapter: Path, folder: Path, kind: str = "Q8_0") -> Path:
    """The model with the adapter added in, as a GGUF file; made at the first call, then kept.

    Args:
        model: A GGUF file.
        adapter: A GGUF LoRA adapter for it.
        folder: Where merged files are kept.
        kind: The GGUF type of its quantized tensors, such as `Q8_0` or `Q4_0`.

    Raises:
        BackendUnavailable: The adapter isn't one for this model, the package gguf isn't installed, or the file
            can't be written.
    """
    with adapter.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = folder / f"{model.stem}+{adapter.stem}-{digest[:16]}.{kind}.gguf"
    if path.is_file():
        return path
    with locked_cache(folder):
        if not path.is_file():
            with temporary_folder(folder) as temporary:
                part = temporary / path.name
                _merge(model, adapter, part, kind)
                part.replace(path)
    return path


def dequantized(model: Path, out: Path) -> Path:
    """Writes a GGUF model with its quantized weights as the numbers they stand for, to tell what quantizing costs.

    Args:
        model: A GGUF file.
        out: The file to write.

    Returns:
        The path written.
    """
    import gguf
    import numpy as np

    weights = gguf.GGUFReader(model)
    architecture = str(weights.fields["general.architecture"].contents())

    def numbers(tensor: Any) -> tuple[Any, Any]:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return values, gguf.GGMLQuantizationType.F32

    _write_model(weights, architecture, out, numbers)
    return out


def _merge(model: Path, adapter: Path, out: Path, kind: str) -> None:
    try:
        import gguf
        import numpy as np
        from gguf.quants import dequantize, quantize
    except ImportError as error:
        raise BackendUnavailable(
            f'The embedded engine needs {error.name}: pip install "rsafe-plugins[embedded]".'
        ) from error

    def numbers(tensor: Any) -> Any:
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    try:
        weights, lora = gguf.GGUFReader(model), gguf.GGUFReader(adapter)
        sides = {tensor.name: tensor for tensor in lora.tensors}
        alpha = float(lora.fields["adapter.lora.alpha"].contents())
        architecture = str(weights.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError) as error:
        raise BackendUnavailable(
            f"{adapter} must be a GGUF LoRA adapter, and {model} a GGUF model."
        ) from error
    wanted = gguf.GGMLQuantizationType[kind]
    kept = (gguf.GGMLQuantizationType.F32, wanted)

    def merged(tensor: Any) -> tuple[Any, Any]:
        a, b = (sides.pop(f"{tensor.name}.lora_{side}", None) for side in "ab")
        if tensor.tensor_type in kept and a is None:
            return tensor.data, tensor.tensor_type
        values = numbers(tensor)
        if a is not None and b is not None:
            first, second = numbers(a), numbers(b)
            if (second.shape[0], first.shape[1]) != values.shape:
                raise BackendUnavailable(f"The adapter {adapter} is for another model than {model}.")
            values += alpha / first.shape[0] * (second @ first)
        return quantize(values, wanted), wanted

    _write_model(weights, architecture, out, merged)
    if sides:
        raise BackendUnavailable(f"The adapter {adapter} is for another model than {model}.")


def _write_model(
    weights: Any, architecture: str, out: Path, stored: Callable[[Any], tuple[Any, Any]]
) -> None:
    """Writes a model as GGUF with the metadata of another one, and its tensors in another form.

    Args:
        weights: The other model's `gguf.GGUFReader`.
        architecture: What GGUF calls its architecture.
        out: The file to write.
        stored: For each of its tensors the data to write, and the `gguf.GGMLQuantizationType` that they have.
    """
    import gguf

    writer = gguf.GGUFWriter(out, architecture)
    for name, field in weights.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in weights.tensors:
        data, kind = stored(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
