"""Rings of places in shared memory, through which the kernels in Gluon stream.

Each place has a barrier that says it is full and one that says it is empty again; both are waited for by parity, which
changes each time around.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SHARED_MEMORY = 225 * 1024
"""Bytes of it that a program on Hopper may take for its tiles; the rest is for barriers."""


@gluon.jit
def barriers(PLACES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each place, in shared memory; each is through when so many have arrived."""
    made = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def next_place(place, parity, PLACES: gl.constexpr):
    """The next place of a ring, and the parity of its use."""
    wrapped = place == PLACES - 1
    return gl.where(wrapped, 0, place + 1), gl.where(wrapped, parity ^ 1, parity)


def tiles_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Tiles ``block`` of a tensor of half precision with contiguous, 16-byte aligned rows, as products read them."""
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
