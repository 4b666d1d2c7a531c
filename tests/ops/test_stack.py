"""Calls that cross the end of a chunk of CPython's stack, with and without room on it."""

import resource
import sys

import pytest

from flashsvd_compile.ops.stack import call_with_room

CALLS = 300
DEPTHS = range(150)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.implementation.name != "cpython",
    reason="counts page faults of the stack that CPython 3.11 to 3.13 have",
)


def nothing(depth: int) -> int:
    return depth


def calls(depth: int) -> int:
    """Page faults of many calls a few frames deep, made so deep in the stack."""
    if depth:
        return calls(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        nothing(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_calls_with_room_map_no_chunk_each():
    without = [calls(depth) for depth in DEPTHS]
    assert max(without) >= CALLS, "at some depth each call maps a chunk"
    crossing = without.index(max(without))

    def deep(depth: int) -> int:
        return deep(depth - 1) if depth else call_with_room(calls, (0,))

    assert all(deep(depth) < CALLS // 10 for depth in range(max(0, crossing - 20), crossing + 20))


def test_arguments_and_errors_pass_through():
    assert call_with_room(lambda *values: values, (1, "two", None)) == (1, "two", None)
    with pytest.raises(KeyError):
        call_with_room({}.__getitem__, ("missing",))
