"""Calls that cross the end of a chunk of CPython's stack, with and without room on it."""

import resource
import sys
import traceback
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from flashsvd_compile import backend
from flashsvd_compile.stack import call_with_room

CALLS = 300
DEPTHS = range(400)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.implementation.name != "cpython",
    reason="counts page faults of the stack that CPython 3.11 to 3.13 have",
)


def nothing(depth: int) -> int:
    return depth


nothing.__code__ = nothing.__code__.replace(co_stacksize=128)  # more than calls takes: at some depth it does not fit


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


def test_rewritten_graphs_run_with_room(monkeypatch):
    """And others as Inductor runs them."""
    seen: list[bool] = []

    def noticing(graph_module, *_):
        def run(*arguments):
            seen.append("call_with_room" in [frame.name for frame in traceback.extract_stack()])
            return graph_module(*arguments)

        return run

    monkeypatch.setitem(backend._INNER, "eager", noticing)
    x, down, up = torch.randn(40, 32), torch.randn(4, 32), torch.randn(48, 4)
    how: dict[str, Any] = {"inner": "eager", "strategy": "streamed"}
    low_rank = torch.compile(lambda x: linear(linear(x, down), up), backend="flashsvd", options=how)
    other = torch.compile(lambda x: linear(x, down), backend="flashsvd", options=how)
    for function in (low_rank, other):
        function(x)
    assert seen == [True, False]


def test_arguments_and_errors_pass_through():
    assert call_with_room(lambda *values: values, (1, "two", None)) == (1, "two", None)
    with pytest.raises(KeyError):
        call_with_room({}.__getitem__, ("missing",))
