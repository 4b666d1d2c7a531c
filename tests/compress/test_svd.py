"""The truncated decomposition is the best one, in the norm it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsvd_compile.compress.svd import truncated_svd


def _matrix(m: int, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(m * 100 + n))


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 20), n=st.integers(1, 20), data=st.data())
def test_error_is_the_tail_of_the_singular_values(m: int, n: int, data: st.DataObject):
    rank = data.draw(st.integers(1, min(m, n)))
    weight = _matrix(m, n)
    down, up = truncated_svd(weight, rank)
    assert down.shape == (rank, n)
    assert up.shape == (m, rank)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(weight - up @ down), tail, atol=1e-9, rtol=1e-9)


def test_factors_are_balanced():
    down, up = truncated_svd(_matrix(12, 9), 5)
    torch.testing.assert_close(down @ down.T, up.T @ up)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_weights(dtype: torch.dtype):
    weight = _matrix(16, 8, dtype)
    down, up = truncated_svd(weight, 8)
    assert down.dtype == up.dtype == dtype
    bound = 20 * torch.finfo(dtype).eps * torch.linalg.norm(weight.double())
    assert torch.linalg.norm(up.double() @ down.double() - weight.double()) < bound


class TestWithMoment:
    @staticmethod
    def _outputs_error(weight: torch.Tensor, x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        down, up = factors
        return torch.linalg.norm((weight - up @ down) @ x).item()

    def test_error_is_the_tail_of_the_outputs_singular_values(self):
        weight, x = _matrix(10, 14), _matrix(14, 200)
        x[:7] *= 30
        error = self._outputs_error(weight, x, truncated_svd(weight, 7, x @ x.T))
        tail = torch.linalg.svdvals(weight @ x)[7:].square().sum().sqrt().item()
        assert error == pytest.approx(tail, rel=1e-4)
        assert error < 0.5 * self._outputs_error(weight, x, truncated_svd(weight, 7))

    @pytest.mark.parametrize("seen", [0, 3])
    def test_inputs_never_seen(self, seen: int):
        """A singular moment, all zero even, leaves finite factors that are right on what was seen."""
        weight, x = _matrix(10, 14), torch.zeros(14, 5, dtype=torch.float64)
        x[:seen] = _matrix(3, 5)[:seen]
        factors = truncated_svd(weight, 5, x @ x.T)
        assert all(factor.isfinite().all() for factor in factors)
        assert self._outputs_error(weight, x, factors) <= 1e-2 * torch.linalg.norm(weight @ x).item()
