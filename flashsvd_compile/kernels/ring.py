"""Rings of places in shared memory, through which the kernels in Gluon stream.

Each place has a barrier that says it is full and one that says it is empty again; both are waited for by parity, which
changes each time around.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHARED_MEMORY = 225 * 1024
"""Bytes of it that a program on Hopper may take for its tiles; the rest is for barriers."""


@gluon.jit
def next_place(place, parity, PLACES: gl.constexpr):
    """The next place of a ring, and the parity of its use."""
    wrapped = place == PLACES - 1
    return gl.where(wrapped, 0, place + 1), gl.where(wrapped, parity ^ 1, parity)
