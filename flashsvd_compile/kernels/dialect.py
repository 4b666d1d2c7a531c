"""What Gluon, an experimental language of Triton, calls otherwise from version to version; here by its names in 3.9."""

# pyright: reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

wait_for_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # before 3.7
"""A barrier for all threads of the program, or of the partition of it that calls it."""
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before 3.8
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global  # before 3.8
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # since 3.9


@gluon.jit
def seen_as(memory, SHAPE: gl.constexpr, layout: gl.constexpr):
    """Shared memory as another shape of as many elements; since 3.8 of no others."""
    if _REINTERPRETS:
        return memory.reinterpret(memory.dtype, SHAPE, layout)
    else:
        return memory._reinterpret(memory.dtype, SHAPE, layout)
