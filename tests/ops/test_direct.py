"""Operators called past the dispatcher: only where nothing would see the difference."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from flashsvd_compile import ops
from flashsvd_compile.ops.direct import below_autograd, call_directly
from tests.ops.regions import mlp_arguments

library = torch.library.Library("flashsvd_test_direct", "FRAGMENT")


class Following(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def operator() -> torch._ops.OpOverload:
    """Says how it is called: 1 by the dispatcher, 2 directly."""
    library.define("said(Tensor x, float factor=1.0) -> Tensor")
    library.impl("said", lambda x, factor=1.0: x.new_full((), factor), "CompositeExplicitAutograd")
    operator = torch.ops.flashsvd_test_direct.said.default
    call_directly(operator, {"cpu": lambda x, factor=1.0: x.new_full((), 2 * factor)})
    return operator


def test_directly_within_compiled_code_only(operator):
    x = torch.zeros(3)
    assert operator(x) == 1
    assert below_autograd(lambda: operator(x, 3.0))() == 6
    assert operator(x) == 1


def test_by_the_dispatcher_where_a_mode_follows(operator):
    with Following() as following:
        below_autograd(operator)(torch.zeros(3))
    assert operator in following.seen


def test_by_the_dispatcher_where_the_profiler_follows(operator):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        assert below_autograd(operator)(torch.zeros(3)) == 1
    assert operator.name() in {event.key for event in seen.key_averages()}


def test_by_the_dispatcher_on_other_devices_and_by_keyword(operator):
    x = torch.zeros(3)
    assert below_autograd(lambda: operator(x, factor=1.0))() == 1
    assert below_autograd(lambda: operator(x.to("meta")))().is_meta


def test_what_fails_leaves_no_trace(operator):
    def failing() -> Tensor:
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        below_autograd(failing)()
    assert operator(torch.zeros(3)) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_an_operator_gives_the_same(autocast):
    given = mlp_arguments(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, direct = ops.mlp(*given), below_autograd(ops.mlp)(*given)
    assert direct.dtype == expected.dtype and torch.equal(direct, expected)
    with torch.no_grad():
        assert not direct._is_view()
