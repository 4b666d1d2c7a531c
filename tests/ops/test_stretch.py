"""When launches between two allocations become a CUDA graph; ``tests/gpu/test_stretch.py`` has the graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashsvd_compile.ops import stretch as stretches
from flashsvd_compile.ops.stretch import Stretch


class Graph:
    """A captured graph: what it makes, where it was captured."""

    def __init__(self, replay: Callable[[], None]):
        self.replay = replay


class Gpu:
    """A GPU without graphs of its own: its current stream, whether somebody captures, and what was captured here."""

    def __init__(self):
        self.stream, self.capturing, self.graphs = 0, False, []

    def captured(self, make: Callable[[], None]) -> Graph:
        self.graphs.append(Graph(make))
        return self.graphs[-1]


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(stretches, "_captured", gpu.captured)
    monkeypatch.setattr(stretches, "current_stream", lambda: gpu.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    return gpu


def doubling() -> Stretch:
    """Writes twice the first tensor into the third; the second is nothing to it."""
    return Stretch(lambda tensors: torch.mul(tensors[0], 2, out=tensors[2]), (0, 2))


def tensors() -> list[Tensor]:
    return [torch.randn(3), torch.randn(3), torch.empty(3)]


def test_the_second_time_at_the_same_addresses_is_captured(gpu):
    stretch, (x, _, out) = doubling(), tensors()
    for times in range(4):
        x.normal_()
        stretch.run([x, torch.empty(5), out.fill_(torch.nan)])
        assert torch.equal(out, 2 * x)
        assert len(gpu.graphs) == min(times, 1)


def test_other_addresses_and_other_streams_have_graphs_of_their_own(gpu):
    stretch, some, others = doubling(), tensors(), tensors()
    for given in (some, others, some, others, some, others):
        stretch.run(given)
        assert torch.equal(given[2], 2 * given[0])
    assert len(gpu.graphs) == 2
    gpu.stream = 1
    stretch.run(some)
    assert len(gpu.graphs) == 2
    stretch.run(some)
    assert len(gpu.graphs) == 3


def test_two_stretches_share_no_graph(gpu):
    given = tensors()
    tripling = Stretch(lambda tensors: torch.mul(tensors[0], 3, out=tensors[2]), (0, 2))
    for stretch, factor in ((doubling(), 2), (tripling, 3)):
        for _ in range(3):
            stretch.run(given)
            assert torch.equal(given[2], factor * given[0])
    assert len(gpu.graphs) == 2


def test_nothing_is_captured_or_replayed_while_somebody_else_captures(gpu):
    stretch, given = doubling(), tensors()
    stretch.run(given)
    stretch.run(given)
    gpu.graphs[0].replay = lambda: pytest.fail("a graph within a graph")
    gpu.capturing = True
    for some in (given, tensors()):
        for _ in range(3):
            stretch.run(some)
            assert torch.equal(some[2], 2 * some[0])
    assert len(gpu.graphs) == 1


def test_without_room_for_scratch_memory_launches_stay_apart(gpu, monkeypatch):
    asked = []

    def captured(make):
        asked.append(make)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stretches, "_captured", captured)
    stretch, given = doubling(), tensors()
    for _ in range(5):
        given[2].fill_(torch.nan)
        stretch.run(given)
        assert torch.equal(given[2], 2 * given[0])
    assert len(asked) == 1
