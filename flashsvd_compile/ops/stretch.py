"""CUDA graphs of what an operator launches between two allocations.

A model's tensors are mostly where they were at the last call: weights stay, and a caching allocator gives the same
blocks to the same requests. So a stretch of launches is captured when it meets a set of addresses again, and is one
launch of a CUDA graph whenever it meets them from then on. A graph has no tensors: what it reads and writes belongs to
the call, whose addresses choose it. The library's products find their scratch memory (32 MiB on Hopper, once a stream)
in a pool of their stream.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from ..kernels.launch import current_stream

REMEMBERED = 2048
"""Sets of addresses, of all stretches together; the one that was met longest ago goes first."""

_capturing = Lock()


class Stretch:
    """Launches and library operations that allocate nothing, on one device's current stream.

    Args:
        make: makes them for a call's tensors; what it does depends on the addresses of some of these only.
        bases: which.
    """

    def __init__(self, make: Callable[[list[Tensor]], object], bases: Sequence[int]):
        self._make = make
        self._bases = tuple(bases)
        self._has_room = True

    def run(self, tensors: list[Tensor]) -> None:
        """Make them, as a graph where these addresses were met before; while somebody else captures, one by one."""
        if torch.cuda.is_current_stream_capturing():
            self._make(tensors)
            return
        met = _meet(self, current_stream(), *[tensors[base].data_ptr() for base in self._bases])
        if met.graph is None and met.again and self._has_room:
            try:
                met.graph = _captured(lambda: self._make(tensors))
            except torch.OutOfMemoryError:  # for the library's scratch memory; one by one there is some already
                self._has_room = False
        met.again = True
        if met.graph is None:
            self._make(tensors)
        else:
            met.graph.replay()


class _Met:
    """What is known of a stretch at one set of addresses.

    Attributes:
        again: whether it was made there before.
        graph: its graph, once there is one.
    """

    def __init__(self):
        self.again = False
        self.graph: torch.cuda.CUDAGraph | None = None


@lru_cache(REMEMBERED)
def _meet(stretch: Stretch, stream: int, *addresses: int) -> _Met:
    return _Met()


@lru_cache(None)
def _beside(stream: int, device: int) -> tuple[torch.cuda.Stream, torch.cuda.MemPool]:
    """Where graphs for a stream are captured, and the pool that they take memory from, which outlives them.

    A stream's own, as graphs that run at the same time must not share scratch memory.
    """
    return torch.cuda.Stream(device), torch.cuda.MemPool()


def _captured(make: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what ``make`` launches; nothing is launched.

    By its own thread's rules, so that other threads may do what they like; and without the pause of
    :class:`torch.cuda.graph`, which waits for the device and collects garbage.
    """
    stream, pool = _beside(current_stream(), torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.stream(stream):
        graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")  # pyright: ignore[reportArgumentType]
        try:
            make()
        finally:
            graph.capture_end()
    return graph
