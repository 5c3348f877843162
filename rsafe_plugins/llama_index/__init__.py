"""The guard in LlamaIndex: `RSafeNodePostprocessor`, which keeps only the nodes that are safe."""

from rsafe_plugins.llama_index.postprocessor import RSafeNodePostprocessor

__all__ = ["RSafeNodePostprocessor"]
