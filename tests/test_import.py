"""What `import rsafe_plugins` costs."""

import subprocess
import sys

FRAMEWORKS = {
    "nemoguardrails",
    "langchain_core",
    "langchain",
    "llama_index",
    "torch",
    "transformers",
    "vllm",
    "openai",
    "xllamacpp",
    "peft",
    "gguf",
    "numpy",
}


def test_importing_the_package_or_its_command_line_imports_no_framework_and_no_engine() -> None:
    code = "import sys, rsafe_plugins, rsafe_plugins.cli; print(*(name for name in sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not FRAMEWORKS & set(imported.split())
