"""Tiles chosen by timing them, once for each kind of launch. Off unless a caller is :func:`tuning`.

The first launch of a kind is made with what the table lists, and with the neighbours of the table's choice, in scratch
memory; of those whose results agree with the table's the fastest is taken and kept (``choices.py``). Another tile is
another order of summation and nothing else.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from traceback import clear_frames
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from ..measure import Times, times
from .choices import Choices, Problem, folder_of_user
from .launch import Launch, is_listened_to, listening
from .target import allows_tf32, environment

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Any)
"""A ``Tile``: a ``NamedTuple`` of ``block_*``, ``num_warps`` and ``num_stages``."""

LAUNCHES = 4
"""In a sample of a time, so that the gap before the first one counts little."""
GAIN = 0.02
"""Share of the time by which another tile must be ahead of the table's; less is noise."""


class Clock:
    """Times launches on a GPU; tests bring their own."""

    def may_time(self, device: torch.device) -> bool:
        """Not on a CPU, where Triton interprets, nor while a CUDA graph or a recording (``ops/replay.py``) is made."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing() and not is_listened_to()

    def times(self, calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Times]:
        """Times of each call, warm, in turns.

        Not ``triton.testing.do_bench``, which takes 256 MiB: the memory pool of a CUDA graph would keep them.
        """
        return times(calls, device)


class Tuner:
    """Chooses tiles, and remembers them in this process and in a folder that others may share.

    Args:
        folder: of the choices.
        clock: how launches are timed, and when they may be.
    """

    def __init__(self, folder: Path, clock: Clock | None = None):
        self._choices, self._clock = Choices(folder), clock or Clock()
        self._known: dict[tuple, Any] = {}

    def tile(self, problem: Problem, tiles: Sequence[T], run: Callable[[T], list[Tensor]], device: torch.device) -> T:
        """The fastest tile for a problem; the table's where none is known and this is no time to find out.

        Args:
            problem: what the launch is.
            tiles: what the table lists, its choice first.
            run: launches with a tile and returns the results, ``[..., n]`` each, in memory that nobody else looks at.
            device: where it launches.
        """
        key = tuple(problem.items())
        if key not in self._known:
            candidates = list(dict.fromkeys((*tiles, *neighbours(tiles[0]))))
            tile = self._choices.read(problem, candidates)
            if tile is None:
                if not self._clock.may_time(device):
                    return tiles[0]
                tile = self._fastest(problem, candidates, run, device)
            self._known[key] = tile
        return self._known[key]

    def _fastest(self, problem: Problem, tiles: list[T], run: Callable[[T], list[Tensor]], device: torch.device) -> T:
        first, *others = tiles
        table = _attempt(run, first)
        if table is None or not all(bool(result.isfinite().all()) for result in table.results):
            logger.warning("not tuned, for want of memory or of finite numbers to compare: %s", problem)
            return first
        shares = {tile: self._share(table, run, tile, device) for tile in others}
        best = min(shares, key=shares.__getitem__)
        if shares[best] >= 1 - GAIN:
            best = first
        share = shares.get(best, 1.0)
        logger.info("%s takes %.2f of the time of %s: %s", best, share, first, problem)
        self._choices.write(problem, best, share)
        return best

    def _share(self, table: "_Attempt", run: Callable[[T], list[Tensor]], tile: T, device: torch.device) -> float:
        """Share of the table's time that a tile takes; infinite for one that is no good."""
        attempt = _attempt(run, tile)
        if attempt is None:
            return float("inf")
        if not all(map(agree, attempt.results, table.results)):
            logger.warning("%s gives another result than %s", tile, table.tile)
            return float("inf")
        names = str(table.tile), str(tile)
        taken = self._clock.times({names[0]: table.again, names[1]: attempt.again}, device)
        return taken[names[1]].median_ms / taken[names[0]].median_ms


class _Attempt:
    """A tile's launch, to be compared and made again."""

    def __init__(self, run: Callable[[Any], list[Tensor]], tile: Any):
        self.tile = tile
        launches: list[tuple[Launch, list[Tensor]]] = []
        with listening(lambda launch, tensors: launches.append((launch, tensors))):
            self.results = run(tile)
        self._calls = [launch.on(tensors) for launch, tensors in launches]
        self._alive = [tensors for _, tensors in launches]

    def again(self) -> None:
        """The kernel alone: the Python around it takes longer than a short kernel."""
        for _ in range(LAUNCHES):
            for function, arguments in self._calls:
                function(*arguments)


def _attempt(run: Callable[[T], list[Tensor]], tile: T) -> _Attempt | None:
    """``None`` where the tile does not compile, needs more than the chip has or finds no memory."""
    try:
        return _Attempt(run, tile)
    except (RuntimeError, TritonError) as error:
        clear_frames(error.__traceback__)  # Triton's errors live on in cycles, and with them the frames' tensors
        logger.info("%s is left out: %s", tile, error)
        return None


RANGES = {"num_warps": (4, 8), "num_stages": (1, 4)}
"""Ranges that :func:`neighbours` stay in; blocks stay in 16 to 128."""


def neighbours(tile: T) -> Iterator[T]:
    """Tiles with a block or the warps halved or doubled, or the pipeline one step shallower or deeper."""
    for name, value in tile._asdict().items():
        least, most = RANGES.get(name, (16, 128))
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        yield from (tile._replace(**{name: other}) for other in others if least <= other <= most)


def agree(result: Tensor, expected: Tensor) -> bool:
    """Whether results ``[..., n]`` differ by no more than rounding.

    A row may differ by a few units in the last place of itself and of the median row: rows may cancel, and a few may
    be far larger than all others.
    """
    differences, sizes = (_norms(rows) for rows in (result - expected, expected))
    allowed = max(4 * torch.finfo(expected.dtype).eps, 1e-4)
    return bool((differences <= allowed * (sizes + sizes.median())).all())


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


_tuner: ContextVar[Tuner | None] = ContextVar("tuner", default=None)


@contextmanager
def tuning(tuner: Tuner) -> Iterator[None]:
    """Let kernels that this thread launches inside ask a tuner for their tiles."""
    token = _tuner.set(tuner)
    try:
        yield
    finally:
        _tuner.reset(token)


def tuner_at_work() -> Tuner | None:
    """The tuner that kernels ask; ``None`` where the tables decide."""
    return _tuner.get()


def tuned(
    kernel: str,
    tiles: Sequence[T],
    run: Callable[[T], list[Tensor]],
    like: Tensor,
    **problem: str | int | bool,
) -> T:
    """The table's choice ``tiles[0]``, or that of the tuner at work.

    Args:
        kernel: its name.
        tiles, run: see :meth:`Tuner.tile`.
        like: a tensor of the launch, for device and dtype.
        problem: sizes and flags of the launch; numbers of rows are :func:`about`.
    """
    tuner = _tuner.get()
    if tuner is None:
        return tiles[0]
    rounded = like.dtype == torch.float32 and allows_tf32()
    where = {"kernel": kernel, **environment(like.device), "dtype": str(like.dtype), "rounded_to_tf32": rounded}
    return tuner.tile(where | problem, tiles, run, like.device)


def about(size: int) -> int:
    """The next power of two: numbers of rows in between share a choice."""
    return triton.next_power_of_2(size)


def tuner_of_user() -> Tuner:
    """The tuner whose choices are in the user's cache folder, one for all models."""
    return _tuner_at(folder_of_user())


@cache
def _tuner_at(folder: Path) -> Tuner:
    return Tuner(folder)
