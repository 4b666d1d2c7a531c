"""What kernels ask PyTorch for."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import linear

from flashsvd_compile.kernels.target import allows_tf32, describable
from flashsvd_compile.ops import linear as low_rank_linear


def _by_old_interface(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def _by_new_interface(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def _for_all_backends(precision: str) -> None:
    torch.backends.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]


SETTINGS: dict[str, tuple[Callable[[str], None], str, bool]] = {
    "highest": (_by_old_interface, "highest", False),
    "high": (_by_old_interface, "high", True),
    "medium": (_by_old_interface, "medium", True),
    "tf32": (_by_new_interface, "tf32", True),
    "ieee": (_by_new_interface, "ieee", False),
    "tf32 for all backends": (_for_all_backends, "tf32", True),
}


@pytest.fixture(params=SETTINGS)
def allowed(request) -> Iterator[bool]:
    """Whether tf32 is allowed, which was said by one of PyTorch's interfaces."""
    say, precision, allowed = SETTINGS[request.param]
    say(precision)
    yield allowed
    _by_old_interface("highest")
    _for_all_backends("none")
    _by_new_interface("none")


def test_tf32_is_allowed_by_any_interface(allowed):
    """An operator works under each, although PyTorch refuses to say by the old one what the new one was told."""
    assert allows_tf32() == allowed
    x, down, up = torch.randn(5, 8), torch.randn(3, 8), torch.randn(6, 3)
    for _ in range(3):  # as it is, recorded and replayed
        torch.testing.assert_close(low_rank_linear(x, down, None, up, None), linear(linear(x, down), up))


def test_what_descriptors_read():
    """Triton refuses other strides with an assertion, and the hardware other addresses."""
    memory = torch.empty(4096, dtype=torch.float16)

    def matrix(*strides: int, first: int = 0) -> torch.Tensor:
        return memory.as_strided((8, 64), strides, first)

    assert describable(matrix(64, 1)) and describable(matrix(72, 1)) and describable(matrix(64, 1, first=8))
    assert not describable(matrix(64, 2)) and not describable(matrix(68, 1)) and not describable(matrix(64, 1, first=4))
    assert not describable(memory.unfold(0, 64, 1)[:8]), "rows that overlap"
    assert not describable(memory[:64].expand(8, 64)), "one row again and again"
