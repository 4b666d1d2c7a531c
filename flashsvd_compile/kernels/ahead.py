"""Compiling kernels before they are launched, beside what else is compiled.

A thread rehearses what launches them, on tensors without contents: nothing is launched there, and Triton compiles each
kernel in a thread of its own, for three quarters of whose time Python is free to do something else. The first launch
that follows waits until all of them are there.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from threading import Thread
from typing import Any

import torch
import triton

from .target import standing_for

logger = logging.getLogger(__name__)

WORKERS = 8
"""Kernels that compile at once; each takes a processor and some hundred MiB."""

_taken: ContextVar[list[Any] | None] = ContextVar("taken", default=None)
_under_way: list[Thread] = []


def compile_ahead(rehearsal: Callable[[], object], device: torch.device) -> None:
    """Begin to compile what the rehearsal launches.

    Args:
        rehearsal: launches kernels for tensors on the meta device, in another thread. What it raises is logged, and
            launches that it does not come to compile their kernels themselves.
        device: the GPU that the tensors stand for.
    """
    thread = Thread(target=_rehearse, args=(rehearsal, device), name="flashsvd-compile", daemon=True)
    _under_way.append(thread)
    thread.start()


def is_rehearsed() -> bool:
    """Whether launches of this thread are only to compile their kernels."""
    return _taken.get() is not None


def take(compiling: Any) -> None:
    """A kernel that Triton has begun to compile for a rehearsal."""
    taken = _taken.get()
    assert taken is not None
    taken.append(compiling)


def finish() -> None:
    """Wait until all is compiled."""
    while _under_way:
        thread = _under_way[-1]
        thread.join()
        if thread in _under_way:  # another thread may have waited as well
            _under_way.remove(thread)


def _rehearse(rehearsal: Callable[[], object], device: torch.device) -> None:
    taken = []
    _taken.set(taken)
    try:
        with torch.no_grad(), torch.cuda.device(device), standing_for(device), ThreadPoolExecutor(WORKERS) as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                rehearsal()
            compiled = {each.kernel if isinstance(each, triton.FutureKernel) else each for each in taken}
            list(pool.map(partial(_load, device), compiled - {None}))
    except Exception as error:
        logger.debug("kernels are compiled when they are launched: %r", error)


def _load(device: torch.device, kernel: Any) -> None:
    """Have Triton build what launches the kernel, as it does at the first launch."""
    with torch.cuda.device(device):
        _ = kernel.run
