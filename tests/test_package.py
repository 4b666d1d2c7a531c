"""What ``import flashsvd_compile`` gives and loads."""

import importlib.metadata

import flashsvd_compile


def test_the_version_is_that_of_the_installed_package():
    assert flashsvd_compile.__version__ == importlib.metadata.version("flashsvd-compile")
