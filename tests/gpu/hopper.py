"""What the tests of the kernels in Gluon share."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from flashsvd_compile.kernels.launch import Launch, listening
from flashsvd_compile.kernels.target import speaks_gluon, target_of

NEEDS_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not speaks_gluon(target_of(torch.device("cuda"))),
        reason="needs a Hopper GPU and a Triton whose Gluon the kernels are written in",
    ),
]


@contextmanager
def one_launch() -> Iterator[list[Launch]]:
    """A list that has the one launch of what runs inside."""
    launches: list[Launch] = []
    with listening(lambda launch, tensors: launches.append(launch)):
        yield launches
    assert len(launches) == 1
