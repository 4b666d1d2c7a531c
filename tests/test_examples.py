"""The examples run and print what they promise."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.usefixtures("small_regions_stay")
@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("compress_and_compile.py", ["4 regions rewritten", "difference from the unfused model", "flashsvd: "]),
        ("own_module.py", ["1 regions rewritten", "largest difference"]),
    ],
)
def test_example(script: str, printed: list[str], capsys: pytest.CaptureFixture[str]):
    torch._dynamo.reset()
    runpy.run_path(str(EXAMPLES / script))
    output = capsys.readouterr().out
    assert all(text in output for text in printed)
