"""Every example in the documentation and every file in examples/ runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.engine


def python_blocks() -> list[object]:
    """Each file's blocks; one marked `python skip` needs what no test machine has, such as a server."""
    blocks = []
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        text = page.read_text("utf-8")
        for found in BLOCK.finditer(text):
            if found["mark"].strip() != "skip":
                line = text.count("\n", 0, found.start()) + 1
                place = f"{page.relative_to(ROOT)}:{line}"
                blocks.append(pytest.param(found["code"], id=place))
    return blocks


def run(*arguments: str, cwd: Path = ROOT) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("code", python_blocks())
def test_documented_example_runs(code: str, tmp_path: Path) -> None:
    run("-c", code, cwd=tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_file_runs(path: Path) -> None:
    run(str(path))
