"""``options={"autotune": True}``: what it reaches, and what it leaves as it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from flashsvd_compile.kernels.autotune import Tuner, tuner_at_work, tuner_of_user

seen: list[Tuner | None] = []


@torch.library.custom_op("flashsvd_tests::sees_the_tuner", mutates_args=())
def sees_the_tuner(x: Tensor) -> Tensor:
    seen.append(tuner_at_work())
    return x.clone()


@sees_the_tuner.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        factors = ((6, 32), (64, 6), (5, 64), (32, 5))
        self.weights = nn.ParameterList(torch.randn(shape) / shape[1] ** 0.5 for shape in factors)

    def forward(self, x: Tensor) -> Tensor:
        down_1, up_1, down_2, up_2 = self.weights
        return sees_the_tuner(gelu(x @ down_1.T @ up_1.T) @ down_2.T @ up_2.T)


@pytest.fixture
def mlp(tmp_path, monkeypatch) -> Mlp:
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    seen.clear()
    return Mlp().requires_grad_(False)


def compiled(mlp: Mlp, **options):
    return torch.compile(mlp, backend="flashsvd", options=options)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_operators_run_under_the_users_tuner_where_it_is_asked_for(mlp, tmp_path, inner):
    x = torch.randn(9, 32)
    expected = mlp(x)
    tuned, by_the_tables = compiled(mlp, inner=inner, autotune=True), compiled(mlp, inner=inner)
    seen.clear()
    for call in (tuned, by_the_tables, tuned, tuned):
        torch.testing.assert_close(call(x), expected)
    assert seen == [tuner_of_user(), None, tuner_of_user(), tuner_of_user()]
    assert not list(tmp_path.iterdir()), "a CPU has nothing to tune"


def test_the_graph_is_the_same(mlp, tmp_path):
    """So compile caches serve both."""

    def graph(autotune: bool) -> str:
        torch.compiler.reset()
        folder: Path = tmp_path / f"autotune-{autotune}"
        compiled(mlp, inner="eager", autotune=autotune, debug=folder)(torch.randn(9, 32))
        return (folder / "graph_0" / "after.py").read_text()

    assert "flashsvd.mlp" in graph(True)
    assert graph(True) == graph(False)
