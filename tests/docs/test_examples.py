"""Every example in the documentation and every file in examples/ runs as it stands."""

from __future__ import annotations

import re
import runpy
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


# In this process, where all share one engine; only the demo, which starts processes, gets one of its own.
DEMO = ROOT / "examples" / "demo.py"


@pytest.mark.parametrize("code", python_blocks())
def test_documented_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "path", sorted(set((ROOT / "examples").glob("*.py")) - {DEMO}), ids=lambda path: path.name
)
def test_example_file_runs(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")


def test_the_demo_runs() -> None:
    done = subprocess.run([sys.executable, DEMO], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "What to type next" in done.stdout
