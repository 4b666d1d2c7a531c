"""The examples and the README's first block run and print what they promise."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.mark.usefixtures("small_regions_stay")
@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("compress_and_compile.py", ["4 regions rewritten", "difference from the unfused model", "flashsvd: "]),
        ("own_module.py", ["1 region rewritten", "largest difference"]),
    ],
)
def test_example(script: str, printed: list[str], capsys: pytest.CaptureFixture[str]):
    torch._dynamo.reset()
    runpy.run_path(str(EXAMPLES / script))
    output = capsys.readouterr().out
    assert all(text in output for text in printed)


@pytest.mark.usefixtures("small_regions_stay")
def test_first_block_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    script = tmp_path / "readme.py"
    script.write_text(block[1])
    torch._dynamo.reset()
    runpy.run_path(str(script))
    output = capsys.readouterr().out
    assert "4 regions rewritten" in output
    difference = re.search(r"largest difference: (\S+)", output)
    assert difference is not None and float(difference[1]) < 1e-4
