"""Names of Gluon, Triton's experimental language, that change from one Triton to the next: those of 3.9, under any."""

# pyright: reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# In the order 3.6, 3.7, 3.8, 3.9.
wait_for_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def seen_as(memory, SHAPE: gl.constexpr, layout: gl.constexpr):
    """Shared memory as another shape of as many elements."""
    if _REINTERPRETS:
        return memory.reinterpret(memory.dtype, SHAPE, layout)
    else:
        return memory._reinterpret(memory.dtype, SHAPE, layout)
