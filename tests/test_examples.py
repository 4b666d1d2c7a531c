"""The examples and the README's first block run as users run them, and print what they promise and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def output_of(script: Path) -> str:
    """What a script prints in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "profiler_start" not in run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("compress_and_compile.py", ["4 regions rewritten", "difference from the unfused model", "flashsvd: "]),
        ("own_module.py", ["1 region rewritten", "largest difference"]),
    ],
)
def test_example(script: str, printed: list[str]):
    output = output_of(EXAMPLES / script)
    assert all(text in output for text in printed)


def test_first_block_of_the_readme(tmp_path: Path):
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    script = tmp_path / "readme.py"
    script.write_text(block[1])
    output = output_of(script)
    assert "4 regions rewritten" in output
    difference = re.search(r"largest difference: (\S+)", output)
    assert difference is not None and float(difference[1]) < 1e-4
