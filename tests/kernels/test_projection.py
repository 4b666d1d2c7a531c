"""Which projections come in one launch."""

import pytest
import torch

from flashsvd_compile.kernels import projection
from flashsvd_compile.kernels.target import KNOWN

from .chips import running_on


@pytest.mark.parametrize(("rows", "taken"), [
    (1024, False), (2560, False), (2816, True), (4096, True), (5632, True), (5760, False), (8192, False), (11264, True),
])  # fmt: skip
def test_three_are_taken_by_processors_that_two_leave_idle(rows, taken, monkeypatch):
    monkeypatch.setattr(projection, "speaks_gluon", lambda target: target.name == "sm_90")

    def takes(ranks: list[int], widths: list[int], dtype: torch.dtype = torch.bfloat16) -> bool:
        return projection.takes_three(rows, ranks, widths, dtype, torch.device("cuda"))

    with running_on(KNOWN["sm_90"]):
        assert takes([192, 64, 256], [768, 64, 768]) == taken
        assert not takes([192, 64, 304], [768, 64, 768])
        assert not takes([192, 64, 256], [768, 60, 768])
        assert not takes([192, 64, 256], [768, 64, 768], torch.float32)
    with running_on(KNOWN["sm_80"]):
        assert not takes([192, 64, 256], [768, 64, 768])
