"""What ``import flashsvd_compile`` gives and loads."""

import importlib.metadata
import subprocess
import sys

import flashsvd_compile


def test_the_version_is_that_of_the_installed_package():
    assert flashsvd_compile.__version__ == importlib.metadata.version("flashsvd-compile")


def test_an_import_loads_no_compiler():
    """Dynamo and Inductor take seconds to load; to compress a model or to ask for a version needs neither."""
    program = (
        "import sys, flashsvd_compile.cli; from flashsvd_compile import Options; Options.parse({'inner': 'eager'}); "
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
