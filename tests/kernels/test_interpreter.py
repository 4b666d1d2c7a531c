"""Starts Triton's interpreter on the tests in ``interpreted``, one process for each of :data:`GROUPS`.

``TRITON_INTERPRET`` must be set before Triton is imported, since it decides what ``@triton.jit`` makes of Triton's own
library too, and a process that has it set can compile nothing. Hence processes of their own, which collect what this
one leaves out (``interpreted/conftest.py``). By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"), key=lambda file: file.stat().st_size)
GROUPS = [FILES[first::4] for first in range(4)]
"""A small file takes no longer than its process to start."""


def test_a_file_that_is_named_without_the_interpreter_says_what_to_set(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", str(FILES[0])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "runs in Triton's interpreter: set TRITON_INTERPRET=1" in run.stdout and " passed" not in run.stdout


@pytest.mark.parametrize("files", GROUPS, ids=lambda files: " ".join(file.stem for file in files))
def test_in_the_interpreter(files, pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
