"""Operators and models on a GPU that is not the current one, and on two of them."""

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import flashsvd_compile as fsvd
from flashsvd_compile import ops
from tests.ops.accuracy import FACTOR, assert_within_error_rule, relative_error
from tests.ops.regions import attention_arguments, linear_arguments, mlp_arguments, packed_linear_arguments

from .test_on_device import reference_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

HALF: dict[str, Any] = {"dtype": torch.bfloat16}
WIDE_HEADS: dict[str, Any] = {"features": 512, "head_dim": 128, "ranks": (96, 80, 65, 112), "window": (-1, 0)}
CASES = {
    "fused mlp": (ops.mlp, lambda: mlp_arguments(520, 256, width=512, ranks=(96, None, 80), strategy="fused", **HALF)),
    "streamed mlp": (ops.mlp, lambda: mlp_arguments(520, 256, width=512, ranks=(96, 81, 80), gated=True, **HALF)),
    "mlp of one row": (ops.mlp, lambda: mlp_arguments(1, 256, width=512, ranks=(96, 81, 80), gated=True, **HALF)),
    "mlp of eight rows": (ops.mlp, lambda: mlp_arguments(8, 256, width=512, ranks=(96, 80, 80), gated=True, **HALF)),
    "attention": (ops.attention, lambda: attention_arguments(3, 300, features=256, head_dim=64, **HALF)),
    "causal attention": (ops.attention, lambda: attention_arguments(2, 400, **WIDE_HEADS, **HALF)),
    "long attention": (ops.attention, lambda: attention_arguments(1, 2500, features=256, head_dim=64, **HALF)),
    "linear": (ops.linear, lambda: linear_arguments(5, 256, **HALF)),
    "packed linear": (ops.packed_linear, lambda: packed_linear_arguments(4, 256, **HALF)),
}


def on(device: int, arguments: tuple) -> tuple:
    return tuple(a.to(f"cuda:{device}") if isinstance(a, Tensor) else a for a in arguments)


def llama() -> nn.Module:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=512, num_hidden_layers=2, intermediate_size=1024, vocab_size=1000, **heads)
    config.use_cache = False
    return fsvd.compress(LlamaModel(config).requires_grad_(False).eval(), keep_ratio=0.5).bfloat16()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_operators_beside_the_current_device(name, order):
    """Written, recorded and replayed on both."""
    operator, make = CASES[name]
    for _ in range(4):
        for device in order:
            arguments = on(device, make())
            result = operator(*arguments)
            assert result.device == arguments[0].device
            assert_within_error_rule(result, reference_of(operator), arguments)
    assert torch.cuda.current_device() == 0


def test_operators_in_a_thread_a_device():
    operator, make = CASES["fused mlp"]
    given = [on(device, make()) for device in (0, 1)]
    results: dict[int, Tensor] = {}

    def work(device: int) -> None:
        for _ in range(20):
            results[device] = operator(*given[device])

    threads = [Thread(target=work, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in (0, 1):
        assert_within_error_rule(results[device], reference_of(operator), given[device])


@pytest.mark.parametrize("how", [{}, {"options": {"inner": "eager"}}, {"mode": "reduce-overhead"}], ids=str)
def test_a_model_on_the_other_device(how):
    torch._dynamo.reset()
    model = llama().to("cuda:1")
    assert_right(torch.compile(model, backend="flashsvd", **how), model, "cuda:1")


class Spread(nn.Module):
    """Layers on several devices, the stream moved from one to the next."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(block.to(f"cuda:{device}") for device, block in enumerate(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for device, block in enumerate(self.blocks):
            x = block(x.to(f"cuda:{device}"))
        return x


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("trained", [False, True])
def test_layers_on_two_devices(inner, trained):
    torch._dynamo.reset()
    model = Spread([fsvd.compress(Mlp(), keep_ratio=0.5) for _ in range(2)])
    fast = torch.compile(model, backend="flashsvd", options={"inner": inner})
    x = torch.randn(700, 256, device="cuda:0")
    with torch.set_grad_enabled(trained):
        for _ in range(3):
            result, expected = fast(x), model(x)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    report = fsvd.last_report()
    assert report is not None
    assert report.count("mlp") == 2
    if trained:
        weights = list(model.parameters())
        ours, theirs = (torch.autograd.grad(each.square().sum(), weights) for each in (result, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


def test_layers_that_are_compiled_on_a_device_each():
    """One set of recordings and kernels serves both."""
    torch._dynamo.reset()
    models = [llama().to(f"cuda:{device}") for device in (0, 1)]
    for model in models:
        fast = torch.compile(model, backend="flashsvd")
        assert_right(fast, model, str(model.device))


def assert_right(fast: Any, model: nn.Module, device: str) -> None:
    """Errors of both against float64."""
    ids = torch.randint(0, 1000, (2, 300), device=device)
    exact_model = copy.deepcopy(model).double()
    with torch.no_grad():
        for _ in range(3):
            result = fast(input_ids=ids)[0].clone()
        exact = exact_model(input_ids=ids)[0]
        unfused = relative_error(model(input_ids=ids)[0], exact)
    report = fsvd.last_report()
    assert report is not None
    assert (report.count("attention"), report.count("mlp")) == (2, 2)
    assert relative_error(result, exact) <= FACTOR * unfused
