"""Operators called past the dispatcher: only where nothing would see the difference."""

import contextlib
import signal

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from flashsvd_compile import ops
from flashsvd_compile.ops import direct
from flashsvd_compile.ops.direct import as_compiled_code, call_directly
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


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_directly_within_compiled_code_only(operator):
    x = torch.zeros(3)
    assert operator(x) == 1
    assert as_compiled_code(lambda: operator(x, 3.0))() == 6
    assert operator(x) == 1


def test_by_the_dispatcher_where_gradients_are_on(operator):
    """Another operator of a graph may differentiate what it computes, by operators of ours, too."""

    def differentiating() -> Tensor:
        with torch.enable_grad():
            return operator(torch.zeros(3))

    assert as_compiled_code(differentiating)() == 1


def test_by_the_dispatcher_within_a_transform(operator):
    def transforming() -> Tensor:
        return torch.func.vmap(operator)(torch.zeros(2, 3))

    assert as_compiled_code(transforming)().tolist() == [1, 1]


def test_by_the_dispatcher_where_a_mode_follows(operator):
    with Following() as following:
        as_compiled_code(operator)(torch.zeros(3))
    assert operator in following.seen


def test_by_the_dispatcher_where_the_profiler_follows(operator):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        assert as_compiled_code(operator)(torch.zeros(3)) == 1
    assert operator.name() in {event.key for event in seen.key_averages()}


def test_by_the_dispatcher_on_other_devices_and_by_keyword(operator):
    x = torch.zeros(3)
    assert as_compiled_code(lambda: operator(x, factor=1.0))() == 1
    assert as_compiled_code(lambda: operator(x.to("meta")))().is_meta


def test_what_fails_leaves_no_trace(operator):
    def failing() -> Tensor:
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        as_compiled_code(failing)()
    assert operator(torch.zeros(3)) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_an_operator_gives_the_same(autocast):
    given = mlp_arguments(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, result = ops.mlp(*given), as_compiled_code(ops.mlp)(*given)
    assert result.dtype == expected.dtype and torch.equal(result, expected)
    assert not result._is_view()


def interrupted(*_) -> None:
    raise InterruptedError


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signals by timer")
def test_an_interruption_leaves_no_trace():
    compiled = as_compiled_code(lambda: None)
    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        for _ in range(500):
            with contextlib.suppress(InterruptedError):
                signal.setitimer(signal.ITIMER_REAL, 1e-4)
                while True:
                    compiled()
            assert not direct._in_compiled_code.get()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
