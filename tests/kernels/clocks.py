"""Clocks for tests of tuning: they are told what things take."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashsvd_compile.kernels.autotune import Clock
from flashsvd_compile.measure import Times


class ToldClock(Clock):
    """Milliseconds by tile, 1 for all others.

    Attributes:
        allowed: whether anything may be timed.
        timed: names of the calls, in their order.
    """

    def __init__(self, milliseconds: Mapping[Any, float], allowed: bool = True):
        self._milliseconds = {str(tile): ms for tile, ms in milliseconds.items()}
        self.allowed = allowed
        self.timed: list[str] = []

    def may_time(self, device: torch.device) -> bool:
        return self.allowed

    def times(self, calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Times]:
        self.timed += calls
        return {name: Times(self._milliseconds.get(name, 1.0), 0.0) for name in calls}


class LastIsFastest(Clock):
    """Makes every call once, on whatever device; each tile is faster than the one before."""

    def __init__(self):
        self._share = 1.0

    def may_time(self, device: torch.device) -> bool:
        return True

    def times(self, calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Times]:
        self._share *= 0.9
        for call in calls.values():
            call()
        table, tile = calls
        return {table: Times(1.0, 0.0), tile: Times(self._share, 0.0)}


class Unused(Clock):
    """May time, and must not."""

    def may_time(self, device: torch.device) -> bool:
        raise AssertionError("there was something to time")
