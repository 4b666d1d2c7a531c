"""Factors of odd ranks on a GPU: rows at odd addresses, which the library multiplies 2 to 6 times as slowly.

They are copied, padded with zeros, for as long as they are used.
"""

from torch import Tensor
from torch.nn.functional import pad

from ..kernels.padding import padded_copy
from ..kernels.product import SECTOR
from . import projection as proj
from .projection import Projection

LEAST_ROWS_TO_COPY = 64
"""Copies and products of so many rows take 0.6 to 0.8 of the time of products without, of 16384 rows 0.15 to 0.4 (H200,
768 to 4096 features, ranks 300 to 1021). Fewer were not timed."""
_STEP = 8
"""Elements of half precision in 16 bytes, of which the library reads multiples."""


def padded(rank: int) -> int:
    """The next rank that is multiplied fast."""
    return -(-rank // SECTOR) * SECTOR


def padded_bias(bias: Tensor | None, rank: int) -> Tensor | None:
    """``[rank]``: a bias in rank space, with zeros behind it."""
    return bias if bias is None or len(bias) == rank else pad(bias, (0, rank - len(bias)))


def with_aligned_rank(projection: Projection[Tensor], rows: int) -> Projection[Tensor]:
    """The projection to use for so many rows: of an odd rank, in half precision, copies of its factors."""
    down, down_bias, up, up_bias = projection
    rank = proj.rank(projection)
    if down is None or rank % _STEP == 0 or rows < LEAST_ROWS_TO_COPY or up.element_size() != 2:
        return projection
    aligned = padded(rank)
    return Projection(
        padded_copy(down, down.new_empty(aligned, down.shape[1])),
        padded_bias(down_bias, aligned),
        padded_copy(up, up.new_empty(up.shape[0], aligned)),
        up_bias,
    )
