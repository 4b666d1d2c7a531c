"""CUDA graphs of an operator's launches: what it does must not depend on whether, when and where they were captured."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashsvd_compile import ops
from flashsvd_compile.ops import stretch as stretches
from flashsvd_compile.ops.attention import _cuda as attention_as_written
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.mlp import _cuda as mlp_as_written
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import attention_arguments, mlp_arguments

pytestmark = pytest.mark.gpu


@pytest.fixture
def graphs(monkeypatch) -> list[torch.cuda.CUDAGraph]:
    """Every graph that is captured."""
    captured, made = stretches._captured, []

    def listed(make: Callable[[], None]) -> torch.cuda.CUDAGraph:
        made.append(captured(make))
        return made[-1]

    monkeypatch.setattr(stretches, "_captured", listed)
    return made


def on_gpu(arguments: tuple) -> tuple:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)


def attention(length: int = 300, **how) -> tuple:
    """Library products around our kernels, by several chunks."""
    ranks = how.pop("ranks", (64, 64, 64, 64))
    return on_gpu(
        attention_arguments(
            6, length, features=256, num_heads=4, head_dim=64, ranks=ranks, dtype=torch.bfloat16,
            workspace_bytes=1 << 20, **how,
        )
    )  # fmt: skip


def mlp(rows: int = 600, ranks: tuple[int, int, int] = (64, 64, 64)) -> tuple:
    return on_gpu(mlp_arguments(1, rows, 256, width=512, ranks=ranks, dtype=torch.bfloat16, workspace_bytes=1 << 20))


REGIONS = {
    "attention": (ops.attention, attention_as_written, lambda: attention()),
    "attention at a high rank": (ops.attention, attention_as_written, lambda: attention(ranks=(384, 384, 384, 384))),
    "mlp": (ops.mlp, mlp_as_written, lambda: mlp()),
    "mlp at a high rank": (ops.mlp, mlp_as_written, lambda: mlp(ranks=(500, 500, 500))),
}


@pytest.mark.parametrize("region", REGIONS)
def test_a_graph_does_what_its_launches_do(region, graphs):
    operator, as_written, make = REGIONS[region]
    x, *weights = make()
    for _ in range(6):
        x.normal_()
        expected = as_written(x, *weights).cpu()
        result = operator(x, *weights)
        assert torch.equal(result.cpu(), expected)
        result.fill_(torch.nan)
        del result  # the next one is there again
    assert graphs


def test_kept_results_keep_their_values(graphs):
    x, *weights = attention()
    results, expected = [], []
    for _ in range(8):
        x.normal_()
        expected.append(attention_as_written(x, *weights))
        results.append(ops.attention(x, *weights))
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


def test_somebody_elses_graph_has_the_launches_themselves(graphs):
    x, *weights = attention()
    for _ in range(5):
        ops.attention(x, *weights)
    assert graphs
    captured = len(graphs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.attention(x, *weights)
    for _ in range(3):
        x.normal_()
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, attention_as_written(x, *weights))
    assert len(graphs) == captured


def test_streams_do_not_share_scratch_memory(graphs):
    """Products whose sums are split write parts of them to scratch memory, which two graphs at once must not share."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    given = [mlp(rows=200, ranks=(500, 500, 500)) for _ in streams]
    expected = [mlp_as_written(*some) for some in given]
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(60):
        for stream, some, found in zip(streams, given, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.mlp(*some).clone())
    torch.cuda.synchronize()
    assert graphs
    for found, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(result, wanted) for result in found)


def test_scratch_memory_that_pytorch_gives_back_is_still_there(graphs):
    x, *weights = mlp(ranks=(500, 500, 500))
    for _ in range(5):
        ops.mlp(x, *weights)
    assert graphs
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    taken = torch.full((64 << 20,), torch.nan, device="cuda")
    x.normal_()
    assert torch.equal(ops.mlp(x, *weights), mlp_as_written(x, *weights))
    assert taken.isnan().all()


def test_graphs_can_all_be_forgotten(graphs):
    """The pool that they share stays, with the library's scratch memory in it."""
    x, *weights = mlp(ranks=(500, 500, 500))
    for _ in range(2):
        for _ in range(5):
            x.normal_()
            assert torch.equal(ops.mlp(x, *weights), mlp_as_written(x, *weights))
        assert graphs
        graphs.clear()
        stretches._meet.cache_clear()


def held_by_graphs() -> int:
    """Bytes of the device that PyTorch's allocator has not asked for."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def test_graphs_need_little_memory(graphs):
    layers = [attention() for _ in range(192)]
    calls = [layers[:64], layers]
    held = []
    for some in calls:
        for _ in range(4):
            for given in some:
                ops.attention(*given)
        held.append((len(graphs), held_by_graphs()))
    (few, before), (many, after) = held
    print(f"{many - few} more graphs take {(after - before) / 2**20:.1f} MiB")
    assert many - few >= 128 and after - before < (many - few) << 18


def test_the_error_rule_holds_in_a_graph(graphs):
    given = attention(window=(-1, 0))
    for _ in range(5):
        result = ops.attention(*given)
    assert graphs
    assert_within_error_rule(result, attention_reference, given)
