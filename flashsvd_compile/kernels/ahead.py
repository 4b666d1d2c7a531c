"""Compiling kernels before they are launched, beside what else is compiled.

A thread rehearses what launches them, on tensors without contents: nothing is launched there, and Triton compiles each
kernel in a thread of its own, for three quarters of whose time Python is free to do something else. The first launch
that follows waits until all of them are there.

Where Triton's cache has them all already there is nothing to compile, and loading them beside busy Python takes longer
than at their launches: a thread that lets go of the interpreter, as it does at each file, has it back after 5 ms
(``sys.getswitchinterval``). So what a rehearsal compiled is noted in that cache, and such a rehearsal is left out.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from threading import Thread
from typing import Any

import torch
import triton
from triton.runtime.cache import CacheManager, get_cache_manager, triton_key

from .target import allows_tf32, environment, standing_for

logger = logging.getLogger(__name__)

WORKERS = 8
"""Kernels that compile at once; each takes a processor and some hundred MiB."""

_taken: ContextVar[list[Any] | None] = ContextVar("taken", default=None)
_under_way: list[Thread] = []


def compile_ahead(rehearsal: Callable[[], object], device: torch.device, launches: str) -> None:
    """Begin to compile what the rehearsal launches, unless all of it is in Triton's cache.

    Args:
        rehearsal: launches kernels for tensors on the meta device, in another thread. What it raises is logged, and
            launches that it does not come to compile their kernels themselves.
        device: the GPU that the tensors stand for.
        launches: tells what is launched from all else.
    """
    note = _Note(device, launches)
    if note.is_there():
        return
    triton_key()  # reads 400 MB in pieces, once a process: 0.3 s here, 6 in a thread beside busy Python
    thread = Thread(target=_rehearse, args=(rehearsal, device, note), name="flashsvd-compile", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        logger.debug("kernels are compiled when they are launched: %r", error)
        return
    _under_way.append(thread)


class _Note:
    """Says, in Triton's cache, that all kernels of a rehearsal are there. A wrong one costs time at first launches."""

    NAME = "flashsvd_compile.json"

    def __init__(self, device: torch.device, launches: str):
        self._content = json.dumps({**environment(device), "allows_tf32": allows_tf32(), "launches": launches})

    def is_there(self) -> bool:
        try:
            return self._folder().get_file(self.NAME) is not None
        except OSError as error:  # a cache that cannot be written
            logger.debug("not known what is compiled: %r", error)
            return False

    def write(self) -> None:
        self._folder().put(self._content, self.NAME)

    def _folder(self) -> CacheManager:
        return get_cache_manager(hashlib.sha256(self._content.encode()).hexdigest())


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


def _rehearse(rehearsal: Callable[[], object], device: torch.device, note: _Note) -> None:
    taken = []
    _taken.set(taken)
    try:
        with torch.no_grad(), torch.cuda.device(device), standing_for(device), ThreadPoolExecutor(WORKERS) as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                rehearsal()
            compiled = {each.kernel if isinstance(each, triton.FutureKernel) else each for each in taken}
            list(pool.map(partial(_load, device), compiled - {None}))
        if None not in compiled:
            note.write()
    except Exception as error:
        logger.debug("kernels are compiled when they are launched: %r", error)


def _load(device: torch.device, kernel: Any) -> None:
    """Have Triton build what launches the kernel, as it does at the first launch."""
    with torch.cuda.device(device):
        _ = kernel.run
