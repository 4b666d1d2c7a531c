"""Every test of an operator runs with poisoned memory: what an implementation forgets to write is NaN."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("operators", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("operators")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every uninitialised tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Tests that compile the same operator must not share its recompilation limit."""
    torch._dynamo.reset()
