"""The guard as rails of NeMo Guardrails.

A rail config needs no Python: `import_paths: [rsafe_plugins/rails]`, the flows `rsafe check input` and
`rsafe check output`, and the guard's settings under `custom_data: {rsafe: {...}}`.
"""

from pathlib import Path

from nemoguardrails.rails.llm.config import colang_path_dirs

from rsafe_plugins.nemo.actions import RailActions
from rsafe_plugins.nemo.config import guard_from_config, register
from rsafe_plugins.nemo.iorails import enable_iorails

__all__ = ["RailActions", "enable_iorails", "guard_from_config", "register"]

# NeMo looks for `rsafe_plugins/rails` in the folder it is installed in itself. This adds the folder that this
# package came from, for those who have it on PYTHONPATH, and before the others: the flows must fit this code.
_root = str(Path(__file__).resolve().parents[2])
if _root not in colang_path_dirs:
    colang_path_dirs.insert(0, _root)
