"""Peak activation memory counts what it must, checked against cases computed by hand."""

import pytest
import torch
from torch import Tensor

from flashsvd_compile import measure

CPU = torch.device("cpu")
KIB = 1024


def kib(n: int) -> Tensor:
    return torch.empty(n * KIB, dtype=torch.uint8)


def test_sum_of_what_is_alive_at_once():
    def call() -> Tensor:
        a = kib(100)
        b = kib(50)  # 150 here
        del a
        c = kib(70)  # 120
        del b
        return torch.cat((c, kib(1)))  # 70 + 1 + 71

    assert measure.peak_activation_bytes(call, CPU) == 150 * KIB


def test_what_was_there_before_does_not_count():
    before = kib(500)
    assert measure.peak_activation_bytes(lambda: before[: 10 * KIB].clone(), CPU) == 10 * KIB


def test_no_allocation():
    assert measure.peak_activation_bytes(lambda: None, CPU) == 0


def test_tensors_inside_custom_operators_count():
    @torch.library.custom_op("flashsvd_test::with_workspace", mutates_args=())
    def with_workspace(x: Tensor) -> Tensor:
        workspace = x.new_empty(8 * x.numel())
        return workspace[: x.numel()].copy_(x).clone()

    x = kib(10)
    assert measure.peak_activation_bytes(lambda: with_workspace(x), CPU) == 90 * KIB


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_buffers_of_inductor_count(cpp_wrapper: bool):
    """Two products: Inductor must hold the intermediate and the result, 4 bytes x 64 x (256 + 16)."""
    x, a, b = torch.randn(64, 32), torch.randn(32, 256), torch.randn(256, 16)

    def two_products(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ a).relu() @ b

    compiled = torch.compile(two_products, options={"cpp_wrapper": cpp_wrapper})
    assert measure.peak_activation_bytes(lambda: compiled(x, a, b), CPU) == 4 * 64 * (256 + 16)
    torch._dynamo.reset()


def test_times_are_medians_of_turns():
    order: list[str] = []
    times = measure.times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, samples=4)
    assert set(times) == {"a", "b"}
    assert order[-8:] == ["a", "b"] * 4
    assert all(0 <= time.median_ms < 1000 and time.spread_ms >= 0 for time in times.values())


def test_relative_error():
    assert measure.relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)


@pytest.mark.gpu
def test_cuda_peak_and_time():
    device = torch.device("cuda")
    x = torch.empty(2**20, device=device)

    def call() -> Tensor:
        return (x + 1) + 1

    assert measure.peak_activation_bytes(call, device) == 2 * 4 * 2**20
    assert measure.times({"add": call}, device)["add"].median_ms > 0


def test_relative_error_is_of_frobenius_norms():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert measure.relative_error(torch.tensor([float("nan"), 4.0]), reference) != 0
