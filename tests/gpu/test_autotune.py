"""Tuning on a GPU: right by the error rule, done once, and never where nothing may synchronise."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashsvd_compile as fsvd
from flashsvd_compile import ops
from flashsvd_compile.kernels import attention, mlp, projection, short_attention
from flashsvd_compile.kernels.autotune import Clock, Tuner, tuning
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.mlp import reference as mlp_reference
from tests.kernels.clocks import Unused
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import attention_arguments, mlp_arguments

pytestmark = pytest.mark.gpu
TILES = {
    "mlp_core": mlp.Tile, "projection": projection.Tile, "attention": attention.Tile,
    "short_attention": short_attention.Tile,
}  # fmt: skip


class Counting(Clock):
    """Counts the comparisons that are timed."""

    def __init__(self):
        self.count = 0

    def times(self, calls, device):
        self.count += 1
        return super().times(calls, device)


class CannotTime(Clock):
    """Decides as usual, and fails the test if anything is timed."""

    def times(self, calls, device):
        raise AssertionError("timed")


def operator_of(name: str) -> tuple[Any, Any, tuple, set[str]]:
    """Operator, reference, arguments and kernels."""
    how: dict[str, Any] = {"features": 768, "num_heads": 12, "head_dim": 64, "ranks": (96,) * 4}
    how["dtype"] = torch.bfloat16
    if name == "mlp":
        shape: dict[str, Any] = {"width": 3072, "out_features": 768, "strategy": "fused", "dtype": torch.bfloat16}
        given, kernels = mlp_arguments(4000, 768, ranks=(192, None, 180), **shape), {"mlp_core"}
    elif name == "few rows":
        shape = {"width": 3072, "out_features": 768, "strategy": "fused", "dtype": torch.bfloat16}
        given, kernels = mlp_arguments(200, 768, ranks=(96, None, 96), **shape), {"mlp_core"}
    elif name == "short attention":
        given, kernels = attention_arguments(16, 128, **how), {"projection", "short_attention"}
    else:
        padding = torch.arange(512)[None] < torch.tensor([512, 300, 512, 77])[:, None]
        given = attention_arguments(4, 512, key_padding=padding, **how)
        kernels = {"projection", "attention"}
    arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in given)
    operator, reference = (ops.mlp, mlp_reference) if "mlp_core" in kernels else (ops.attention, attention_reference)
    return operator, reference, arguments, kernels


@pytest.mark.parametrize("name", ["mlp", "few rows", "short attention", "attention"])
def test_tuned_once_and_right(name, tmp_path):
    operator, reference, arguments, kernels = operator_of(name)
    given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    clock = Counting()
    with tuning(Tuner(tmp_path, clock)):
        first = operator(*arguments)
        timed = clock.count
        rest = [operator(*arguments) for _ in range(3)]  # recorded, then replayed
    assert timed > 0
    assert clock.count == timed
    with tuning(Tuner(tmp_path, Unused())):  # as another process
        rest += [operator(*arguments) for _ in range(3)]
    assert_within_error_rule(first, reference, arguments)
    for result in rest:
        torch.testing.assert_close(result, first, rtol=0, atol=0)
    for before, after in zip(given, arguments, strict=True):
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after
    choices = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert {choice["problem"]["kernel"] for choice in choices} == kernels
    for choice in choices:
        assert choice["problem"]["chip"] == torch.cuda.get_device_name()
        assert TILES[choice["problem"]["kernel"]](**choice["tile"])


def test_a_replacement_of_the_input_is_tuned_in_memory_of_its_own(tmp_path):
    x = torch.randn(8192, 768, device="cuda", dtype=torch.bfloat16)
    down, up = (torch.randn(shape, device="cuda", dtype=x.dtype) / shape[1] ** 0.5 for shape in ((96, 768), (768, 96)))
    expected = torch.empty_like(x)
    projection.project(x, projection.Map(down, None, up, None, expected))
    clock = Counting()
    with tuning(Tuner(tmp_path, clock)):
        projection.project(x, projection.Map(down, None, up, None, x))
    assert clock.count > 0
    torch.testing.assert_close(x, expected, rtol=2e-2, atol=1e-2)


def test_tuning_leaves_no_memory_behind(tmp_path):
    operator, _, arguments, _ = operator_of("attention")
    operator(*arguments)
    before = torch.cuda.memory_allocated()
    with tuning(Tuner(tmp_path, Counting())):
        operator(*arguments)
    assert torch.cuda.memory_allocated() <= before


def test_nothing_is_timed_while_a_cuda_graph_is_captured(tmp_path):
    operator, _, arguments, _ = operator_of("mlp")
    expected = operator(*arguments)  # compiles the table's tile
    graph = torch.cuda.CUDAGraph()
    with tuning(Tuner(tmp_path, CannotTime())), torch.cuda.graph(graph):
        captured = operator(*arguments)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


def test_a_tile_beyond_shared_memory_is_left_out(tmp_path, caplog):
    """Rank 384 takes all of it already: a deeper pipeline has none."""
    caplog.set_level("INFO", logger="flashsvd_compile.kernels.autotune")
    if not mlp.supported(384, 384, torch.bfloat16, torch.device("cuda")):
        pytest.skip("no tile for this rank")
    shape: dict[str, Any] = {"width": 3072, "out_features": 768, "strategy": "fused", "dtype": torch.bfloat16}
    given = mlp_arguments(2048, 768, ranks=(384, None, 384), **shape)
    with tuning(Tuner(tmp_path, Counting())):
        ops.mlp(*(a.cuda() if isinstance(a, Tensor) else a for a in given))
    assert "out of resource: shared memory" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_option(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).requires_grad_(False)
    model = fsvd.compress(layers, ranks={"*": 96}).to("cuda", torch.bfloat16)
    options = {"strategy": "fused", "autotune": True} | ({"mode": mode} if mode else {})
    fast, x = (
        torch.compile(model, backend="flashsvd", options=options),
        torch.randn(4096, 768).to("cuda", torch.bfloat16),
    )
    with torch.no_grad():
        results = [fast(x).clone() for _ in range(4)]
    assert [file.name.split("-")[0] for file in (tmp_path / "tiles").iterdir()] == ["mlp_core"]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[0], model(x), rtol=2e-2, atol=2e-2)
