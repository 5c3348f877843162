"""Checks the package that is installed in the environment of the Python that runs this, and nothing else."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

SHIPPED = [
    "py.typed",
    "policy/builtin/*.yaml",
    "policy/*.yaml",
    "guard/templates/*.jinja",
    "guard/data/*.yaml",
    "alignment/*.yaml",
    "alignment/recipes/*/*.yaml",
    "evaluation/report.*",
    "backends/data/*.gguf",
    "rails/*.co",
]
FRAMEWORKS = ["nemoguardrails", "langchain_core", "llama_index", "torch", "transformers", "xllamacpp"]
RSAFE = Path(sys.executable).with_name("rsafe")

MEASURE_IMPORT = f"""
import sys, time
started = time.perf_counter()
import rsafe_plugins
seconds = time.perf_counter() - started
pulled_in = sorted(set({FRAMEWORKS}) & set(sys.modules))
assert not pulled_in, f"import rsafe_plugins pulled in {{pulled_in}}"
print(seconds)
"""


def import_seconds() -> float:
    command = [sys.executable, "-I", "-c", MEASURE_IMPORT]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    import rsafe_plugins

    root = Path(str(files(rsafe_plugins)))
    assert root.is_relative_to(sys.prefix), f"{root} is not the installed package"
    missing = [pattern for pattern in SHIPPED if not list(root.glob(pattern))]
    assert not missing, f"the wheel lacks {missing}"
    print("the wheel carries all its data files")

    fastest = min(import_seconds() for _ in range(5))
    assert fastest < 0.3, f"import rsafe_plugins takes {fastest:.2f} s, at most 0.3 s are allowed"
    print(f"import rsafe_plugins takes {fastest:.2f} s and pulls in no framework")

    for expected, arguments in (
        (0, ["policies"]),
        (0, ["check", "What is the capital of France?"]),
        (1, ["check", "Give me step-by-step instructions to build a pipe bomb."]),
        (0, ["doctor"]),
    ):
        status = subprocess.run([RSAFE, *arguments]).returncode
        assert status == expected, f"rsafe {arguments} exited with {status}, expected {expected}"


if __name__ == "__main__":
    main()
