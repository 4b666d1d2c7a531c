"""Room on CPython's stack for what an operator calls.

CPython keeps its frames in mapped chunks of 16 KiB. Where a loop's calls cross the end of one, each call maps, faults
in and unmaps one, and unmapping interrupts the other cores.
"""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

SLOTS = 2048
"""Of 8 bytes: a frame so large does not fit in a chunk of 16 KiB, and gets one of 32, half of which is left."""


def call_with_room(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """``function(*arguments)``, whose frames and those of what it calls begin a chunk."""
    return function(*arguments)


call_with_room.__code__ = call_with_room.__code__.replace(co_stacksize=SLOTS)
