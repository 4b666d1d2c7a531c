"""Gradients: right for every argument that has one, recomputed in chunks, alike under every backend."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from flashsvd_compile import ops
from flashsvd_compile.errors import TwiceDifferentiatedError
from flashsvd_compile.measure import peak_activation_bytes
from flashsvd_compile.ops import attention, backward, linear, mlp, packed_linear
from flashsvd_compile.ops.activation import ACTIVATIONS
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.linear import reference as linear_reference
from flashsvd_compile.ops.mlp import reference as mlp_reference
from flashsvd_compile.ops.packed_linear import reference as packed_linear_reference

from .accuracy import FACTOR, in_float64, relative_error
from .regions import (
    LAYOUTS,
    attention_arguments,
    linear_arguments,
    mlp_arguments,
    norm,
    packed_linear_arguments,
    padding,
)

CPU = torch.device("cpu")


class Case(NamedTuple):
    operator: torch._ops.OpOverload
    reference: Callable[..., Tensor]
    arguments: tuple


def linear_case(*shape, **how) -> Case:
    return Case(linear, linear_reference, linear_arguments(*shape, **how))


def packed_linear_case(*shape, **how) -> Case:
    return Case(packed_linear, packed_linear_reference, packed_linear_arguments(*shape, **how))


def mlp_case(*shape, **how) -> Case:
    return Case(mlp, mlp_reference, mlp_arguments(*shape, **how))


def attention_case(*shape, **how) -> Case:
    return Case(attention, attention_reference, attention_arguments(*shape, features=6, **how))


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Every kind of argument that gets a gradient, in chunks of one item."""
    how = {"dtype": dtype, "workspace_bytes": 1}
    heads = {"num_heads": 2, "head_dim": 4, "ranks": (3, 2, None, 5)}
    wide = heads | {"head_dim": 8}
    of_heads = partial(norm, dtype=dtype)
    of_all = partial(norm, dtype=dtype, whole=True)
    shared, per_item = torch.randn(2, 4, 4).to(dtype), torch.randn(2, 1, 4, 4).to(dtype)
    kept = torch.rand(2, 1, 4, 4) < 0.7
    return {
        "linear": linear_case(3, 4, 6, rank=2, down_bias=True, **how),
        "linear-dense": linear_case(3, 6, rank=None, **how),
        "packed-linear": packed_linear_case(3, 4, 6, ranks=(2, None, 3), down_bias=True, **how),
        "packed-linear-residual": packed_linear_case(3, 6, ranks=(2,), residual=True, **how),
        "packed-linear-after-norm": packed_linear_case(3, 6, ranks=(2, 3), x_norm=of_heads("rms", 6), **how),
        "mlp": mlp_case(2, 3, 6, width=7, out_features=5, down_bias=True, **how),
        "mlp-gated": mlp_case(5, 6, width=7, out_features=5, gated=True, activation="silu", bias=False, **how),
        "mlp-residual": mlp_case(2, 3, 6, width=7, out_features=5, residual=True, **how),
        "mlp-after-norm": mlp_case(2, 3, 6, width=7, out_features=5, x_norm=of_heads("layer", 6, bias=True), **how),
        "attention": attention_case(3, 4, **heads, **how),
        "attention-after-norm": attention_case(3, 4, **heads, residual=True, x_norm=of_heads("rms", 6), **how),
        "attention-residual": attention_case(3, 4, **heads, residual=True, **how),
        "attention-no-out": attention_case(3, 4, num_heads=2, head_dim=4, out=False, **how),
        "attention-cross": attention_case(2, 3, 5, num_heads=4, num_kv_heads=2, head_dim=4, **how),
        "attention-rotary": attention_case(2, 3, **heads, rotary_dim=4, window=(-1, 0), **how),
        "attention-rotary-per-item": attention_case(
            2, 3, **heads, rotary_dim=2, rotation_per_item=True, interleaved=True, **how
        ),
        "attention-padded": attention_case(3, 4, **heads, key_padding=padding(4, 2, 0, total=4), **how),
        "attention-bool-mask": attention_case(2, 4, **heads, mask=kept, **how),
        "attention-bias": attention_case(2, 4, **heads, mask=shared, **how),
        "attention-bias-per-item": attention_case(2, 4, **heads, mask=per_item, value_dim=5, **how),
        "attention-normed": attention_case(
            3, 8, **wide, rotary_dim=4, q_norm=of_heads("rms", 8), k_norm=of_heads("layer", 2, 8, bias=True), **how
        ),
        "attention-capped": attention_case(
            3, 4, **heads, softcap=0.7, key_padding=padding(4, 2, 0, total=4), window=(-1, 0), **how
        ),
        "attention-capped-bias": attention_case(2, 4, **heads, softcap=0.7, mask=per_item, **how),
        "attention-normed-whole": attention_case(
            3, 8, **wide, q_norm=of_all("layer", 16), k_norm=of_all("rms", 16), **how
        ),
    }


NAMES = tuple(cases(torch.float64))
REGIONS = 16


def leaves(arguments: tuple) -> tuple:
    """The arguments, with every floating tensor made a leaf that wants a gradient."""
    return tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def gradients(function: Callable[..., Tensor], arguments: tuple, seed: Tensor | None = None) -> list[Tensor]:
    """Gradients of ``(function(*arguments) * seed).sum()`` for all floating arguments."""
    arguments = leaves(arguments)
    result = function(*arguments)
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    seed = torch.ones_like(result) if seed is None else seed.to(result.dtype)
    return list(torch.autograd.grad(result, wanted, seed, allow_unused=True, materialize_grads=True))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Let a chunk be as short as the workspace asks for."""
    monkeypatch.setitem(backward.LEAST_ROWS_OF_A_CHUNK, "cpu", 1)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """Against finite differences of the operator itself."""
    operator, _, arguments = cases(torch.float64)[name]
    assert torch.autograd.gradcheck(operator, leaves(arguments), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    """Includes the registration of autograd, and a compiled backward pass with static and dynamic shapes."""
    operator, _, arguments = cases(torch.float32)[name]
    opcheck(operator, leaves(arguments))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule(name, dtype):
    """The median over several regions, each with one norm over all its gradients.

    Some gradients alone vanish, as that of a bias of the keys does in the softmax; a region whose input a norm makes
    much larger errs by luck.
    """
    errors: list[tuple[float, float]] = []
    for _ in range(REGIONS):
        operator, reference, arguments = cases(dtype)[name]
        seed = torch.randn_like(reference(*arguments))
        exact = gradients(reference, in_float64(arguments), seed)
        eager = gradients(reference, arguments, seed)
        ours = gradients(operator, arguments, seed)
        for found, right in zip(ours, exact, strict=True):
            assert found.dtype == dtype
            assert found.shape == right.shape
        flat = [torch.cat([g.double().flatten() for g in group]) for group in (ours, eager, exact)]
        errors.append((relative_error(flat[0], flat[2]), relative_error(flat[1], flat[2])))
    of_ours, of_eager = map(median, zip(*errors, strict=True))
    assert of_ours <= max(FACTOR * of_eager, 2 * torch.finfo(dtype).eps)


@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    gated=st.booleans(),
    down_bias=st.booleans(),
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    layout=st.sampled_from(LAYOUTS),
    workspace_bytes=st.integers(1, 60_000),
)
def test_mlp_of_any_shape(shape, **how):
    arguments = mlp_arguments(*shape, 9, dtype=torch.float64, **how)
    expected = gradients(mlp_reference, arguments)
    torch.testing.assert_close(gradients(mlp, arguments), expected)


@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(0, 6), st.none() | st.integers(0, 6)),
    kv_heads=st.sampled_from((1, 2, 4)),
    window=st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
    mask_shape=st.none() | st.tuples(*(st.booleans() for _ in range(4))),
    layout=st.sampled_from(LAYOUTS),
    workspace_bytes=st.integers(1, 60_000),
)
def test_attention_of_any_shape(sizes, kv_heads, window, mask_shape, **how):
    batch, q_len, kv_len = sizes
    full = (batch, 4, q_len, q_len if kv_len is None else kv_len)
    mask = None
    if mask_shape is not None:
        mask = torch.randn([n if kept else 1 for n, kept in zip(full, mask_shape, strict=True)], dtype=torch.float64)
    arguments = attention_arguments(
        batch, q_len, kv_len, 9, num_kv_heads=kv_heads, window=window, mask=mask, dtype=torch.float64, **how
    )
    torch.testing.assert_close(gradients(attention, arguments), gradients(attention_reference, arguments))


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("eager", False), ("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compiled_training_step(backend, dynamic):
    """A block of attention and MLP between other computation; gradients equal those of the plain references."""
    attend = attention_arguments(2, 5, features=8, key_padding=padding(5, 3, total=5), dtype=torch.float64)
    feed = mlp_arguments(2, 5, 8, out_features=8, dtype=torch.float64)

    def block(attention, mlp, x, *weights):
        x = x + attention(torch.tanh(x), *weights[: len(attend) - 1])
        return (x + mlp(torch.tanh(x), *weights[len(attend) - 1 :])).square()

    arguments = (*attend, *feed[1:])
    compiled = torch.compile(partial(block, attention, mlp), backend=backend, dynamic=dynamic, fullgraph=True)
    expected = gradients(partial(block, attention_reference, mlp_reference), arguments)
    torch.testing.assert_close(gradients(compiled, arguments), expected)


def test_only_needed_gradients():
    arguments = list(mlp_arguments(5, 6))
    arguments[0] = arguments[0].requires_grad_()
    (found,) = torch.autograd.grad(mlp(*arguments).sum(), arguments[0])
    (expected,) = torch.autograd.grad(mlp_reference(*arguments).sum(), arguments[0])
    torch.testing.assert_close(found, expected)
    needs = [i == 0 for i in range(len(arguments))]
    assert len(torch.ops.flashsvd.mlp_backward_v3(torch.ones(5, 16), needs, *arguments)) == 1


def test_a_gradient_of_the_gradient_is_refused():
    arguments = leaves(mlp_arguments(5, 6))
    with pytest.raises(TwiceDifferentiatedError, match="flashsvd::mlp_v3 is differentiable once"):
        torch.autograd.grad(mlp(*arguments).sum(), arguments[0], create_graph=True)


def test_weights_sum_up_in_float32():
    """One row at a time in bfloat16 a running sum would lose the small terms; it errs no more than a whole product."""
    arguments = linear_arguments(2000, 4, out_features=4, rank=2, dtype=torch.bfloat16, workspace_bytes=1)
    exact = gradients(linear_reference, in_float64(arguments))
    ours, eager = gradients(linear, arguments), gradients(linear_reference, arguments)
    for found, usual, right in zip(ours, eager, exact, strict=True):
        allowed = max(FACTOR * relative_error(usual, right), torch.finfo(torch.bfloat16).eps)
        assert relative_error(found, right) <= allowed


class TestMemory:
    """Activation memory of a training step: only inputs are kept, and the backward pass works in chunks."""

    @staticmethod
    def step(region: Callable[..., Tensor], arguments: tuple, depth: int) -> Callable[[], object]:
        x, *rest = leaves(arguments)

        def run():
            y = x
            for _ in range(depth):
                y = region(y, *rest)
            return torch.autograd.grad(y.sum(), x)

        return run

    def test_mlp(self):
        arguments = mlp_arguments(2048, 32, width=256, out_features=32, workspace_bytes=1 << 18)
        ours = peak_activation_bytes(self.step(mlp, arguments, depth=4), CPU)
        eager = peak_activation_bytes(self.step(mlp_reference, arguments, depth=4), CPU)
        assert ours < 0.25 * eager

    def test_attention(self):
        arguments = attention_arguments(8, 128, features=32, workspace_bytes=1 << 18)
        ours, eager = (
            peak_activation_bytes(self.step(f, arguments, depth=4), CPU) for f in (attention, attention_reference)
        )
        assert ours < 0.5 * eager


def test_operators_are_the_public_ones():
    assert (linear, mlp, attention) == (ops.linear, ops.mlp, ops.attention)
