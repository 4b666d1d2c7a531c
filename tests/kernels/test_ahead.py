"""Kernels of a graph's operators compile before they are launched, for a GPU that is not there."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Event
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import gelu, linear
from triton import knobs
from triton.runtime.driver import driver

from flashsvd_compile import backend
from flashsvd_compile.kernels import ahead, target
from flashsvd_compile.kernels.launch import launch
from flashsvd_compile.kernels.target import KNOWN
from flashsvd_compile.passes import rehearsal
from flashsvd_compile.passes.rehearsal import compile_kernels_of
from tests.passes.builder import rewritten, tensor

from .cross import GPUS, _Driver

CHIP = "sm_80"


@pytest.fixture
def loaded(tmp_path) -> Iterator[list]:
    """A GPU that Triton compiles for, into an empty cache, and that loads no kernels; the kernels that it would."""
    kernels: list = []
    with (
        patch.object(knobs.cache, "dir", str(tmp_path)),
        patch.object(target.torch.cuda, "get_device_name", lambda device: CHIP),
        patch.object(driver, "_active", _Driver(GPUS[CHIP])),
        patch.object(target, "_target_of", lambda device: KNOWN[CHIP]),
        patch.object(ahead.torch.cuda, "device", lambda device: nullcontext()),
        patch.object(ahead, "_load", lambda device, kernel: kernels.append(kernel)),
    ):
        yield kernels
        ahead.finish()


def two_mlps(x, a, b, c, d):
    for _ in range(2):
        x = linear(linear(gelu(linear(linear(x, a), b)), c), d)
    return x


WEIGHTS = [tensor(16, 64), tensor(128, 16), tensor(16, 128), tensor(64, 16)]


def graph_of(function, *inputs, **how):
    halves = [each.bfloat16() for each in inputs]
    return rewritten(function, *halves, device="cuda", **how).module.graph


def test_each_kernel_is_compiled_once_and_found_by_its_launch(loaded):
    compiled = []
    graph = graph_of(two_mlps, tensor(8, 512, 64), *WEIGHTS, strategy="fused")
    assert sum(node.target is torch.ops.flashsvd.mlp_v3.default for node in graph.nodes) == 2
    with (
        patch.object(knobs.compilation, "listener", lambda **what: compiled.append(what["src"].name)),
        patch.object(ahead._Note, "is_there", lambda note: False),
    ):
        compile_kernels_of(graph)
        ahead.finish()
        once = list(compiled)
        compile_kernels_of(graph)
        ahead.finish()
    assert sorted(kernel.src.name for kernel in loaded) == sorted(2 * once)
    assert len(once) == len(set(once)) >= 1 and compiled == once


def rehearsals(function, *inputs, **how) -> int:
    """How many begin for a graph; they are at their end."""
    with patch.object(ahead, "Thread", side_effect=ahead.Thread) as threads:
        compile_kernels_of(graph_of(function, *inputs, strategy="fused", **how))
        ahead.finish()
    return threads.call_count


def test_what_the_cache_has_is_not_rehearsed_again(loaded, tmp_path):
    x = tensor(8, 512, 64)
    assert [rehearsals(two_mlps, x, *WEIGHTS) for _ in range(3)] == [1, 0, 0]
    assert rehearsals(two_mlps, tensor(8, 400, 64), *WEIGHTS) == 1, "other sizes"
    with patch.object(ahead, "allows_tf32", lambda: not target.allows_tf32()):
        assert rehearsals(two_mlps, x, *WEIGHTS) == 1, "kernels of another precision"
    with patch.object(knobs.cache, "dir", str(tmp_path / "another")):
        assert rehearsals(two_mlps, x, *WEIGHTS) == 1, "another cache"


def test_what_did_not_compile_is_rehearsed_again(loaded):
    begun = []

    def rehearsal():
        begun.append(ahead.is_rehearsed())
        ahead.take(None)

    for _ in range(2):
        ahead.compile_ahead(rehearsal, torch.device("cuda"), "a kernel that does not compile")
        ahead.finish()
    assert begun == [True, True]


def test_a_cache_that_cannot_be_written_is_rehearsed(loaded, tmp_path):
    (tmp_path / "file").touch()
    with patch.object(knobs.cache, "dir", str(tmp_path / "file")):
        assert [rehearsals(two_mlps, tensor(8, 512, 64), *WEIGHTS) for _ in range(2)] == [1, 1]


def test_dynamic_sizes_are_those_of_the_traced_call(loaded):
    found = []
    for dynamic in (False, True):
        graph = graph_of(two_mlps, tensor(8, 512, 64), *WEIGHTS, strategy="fused", dynamic=dynamic)
        with patch.object(ahead._Note, "is_there", lambda note: False):
            compile_kernels_of(graph)
            ahead.finish()
        found.append(sorted(kernel.hash for kernel in loaded))
        loaded.clear()
    assert found[0] == found[1] != []


def test_sizes_that_nothing_is_known_of_are_left_to_the_launch():
    graph = graph_of(two_mlps, tensor(8, 512, 64), *WEIGHTS, strategy="streamed", dynamic=True)
    with (
        patch.object(rehearsal, "hint_of", lambda size: None),
        patch.object(ahead, "Thread", side_effect=AssertionError),
    ):
        compile_kernels_of(graph)


def test_a_launch_waits_until_all_is_compiled(loaded):
    begun, seen = Event(), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append("launched")

    def rehearsal():
        begun.set()
        time.sleep(0.2)
        seen.append("rehearsed")

    ahead.compile_ahead(rehearsal, torch.device("cuda"), "a kernel")
    assert begun.wait(10)
    launch(Kernel(), (1, 1), torch.ones(4))
    assert seen == ["rehearsed", "launched"]


def test_without_another_thread_kernels_are_left_to_the_launch(loaded):
    with patch.object(ahead.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        ahead.compile_ahead(lambda: None, torch.device("cuda"), "no thread")
    ahead.finish()


def test_what_a_rehearsal_raises_is_left_to_the_launch(loaded):
    begun = []

    def rehearsal():
        begun.append(ahead.is_rehearsed())
        raise RuntimeError("no such kernel")

    for _ in range(2):
        ahead.compile_ahead(rehearsal, torch.device("cuda"), "no kernel")
        ahead.finish()
    assert begun == [True, True] and not ahead.is_rehearsed()


@pytest.mark.parametrize(
    ("options", "begins"),
    [({}, True), ({"compile_ahead": False}, False), ({"autotune": True}, False)],
)
def test_the_backend_compiles_ahead_unless_it_is_asked_not_to(options, begins, monkeypatch):
    begun = []
    monkeypatch.setattr(backend, "compile_kernels_of", begun.append)
    weights = [weight.clone() for weight in WEIGHTS]
    x = tensor(8, 512, 64)
    fast = torch.compile(lambda x: two_mlps(x, *weights), backend="flashsvd", options={"inner": "eager"} | options)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), two_mlps(x, *weights))
    assert len(begun) == begins


def test_without_a_gpu_nothing_is_compiled_ahead():
    with patch.object(ahead, "Thread", side_effect=AssertionError):
        compile_kernels_of(rewritten(two_mlps, tensor(8, 512, 64), *WEIGHTS, strategy="streamed").module.graph)
