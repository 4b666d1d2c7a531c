"""Room on CPython's stack for what a compiled graph calls.

CPython keeps its frames in mapped chunks of 16 KiB. Where a loop's calls cross the end of one, each call maps, faults
in and unmaps one, and unmapping interrupts the other cores. A compiled graph is such a loop, and its operators are.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")

SLOTS = 8192
"""Slots of 8 bytes: a frame of 64 KiB gets a chunk of 128. The half that is left has room for a hundred frames and the
thousands of variables of a large graph's code; pages that nobody writes to are never faulted in."""


def call_with_room(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """``function(*arguments)``, whose frames and those of what it calls begin a chunk."""
    return function(*arguments)


def with_room(function: Callable[..., T]) -> Callable[..., T]:
    """The function, which begins a chunk whenever it is called by position."""

    @wraps(function)
    def call(*arguments: Any) -> T:
        return call_with_room(function, arguments)

    return call


call_with_room.__code__ = call_with_room.__code__.replace(co_stacksize=SLOTS)
