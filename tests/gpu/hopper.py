"""What the tests of the kernels in Gluon share."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton

from flashsvd_compile.kernels.launch import Launch, listening

NEEDS_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not triton.__version__.startswith("3.6"), reason="written for the Gluon of Triton 3.6"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@contextmanager
def one_launch() -> Iterator[list[Launch]]:
    """A list that has the one launch of what runs inside."""
    launches: list[Launch] = []
    with listening(lambda launch, tensors: launches.append(launch)):
        yield launches
    assert len(launches) == 1
