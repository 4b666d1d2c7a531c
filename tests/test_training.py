"""Gradients wherever PyTorch asks for them: outside the graph, inside it, below autograd, of bodies, in checkpoints."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn.functional import rms_norm
from torch.utils.checkpoint import checkpoint

from flashsvd_compile import RefusalReason, RewriteReport, last_report, rewrite
from flashsvd_compile.ops import backward

FEATURES, WIDTH, RANK = 32, 64, 6
INNER = ["eager", "aot_eager", "inductor"]


def pair(in_features: int = FEATURES, out_features: int = FEATURES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, RANK, bias=False), nn.Linear(RANK, out_features))


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(*pair(FEATURES, WIDTH), activation or nn.GELU(), *pair(WIDTH, FEATURES))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def latest() -> RewriteReport:
    report = last_report()
    assert report is not None
    return report


def compiled(function: Callable, inner: str = "aot_eager", **how) -> Callable:
    return torch.compile(function, backend="flashsvd", options={"strategy": "streamed", "inner": inner}, **how)


def gradients(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(x).square().sum(), list(module.parameters()))


@pytest.mark.parametrize("inner", INNER)
def test_a_frozen_region_behind_a_trained_one_whose_result_is_overwritten(inner):
    """The second reads what the first gives, of which gradients are wanted, and needs it for them."""
    trained, frozen, x = mlp(), pair().requires_grad_(False), torch.randn(5, FEATURES)

    def function(x):
        first = trained(x)
        second = frozen(first)
        first.mul_(2)
        return second + first

    expected = gradients(function, trained, x)
    torch.testing.assert_close(gradients(compiled(function, inner), trained, x), expected)
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("inner", INNER)
def test_packed_projections_of_one_row_that_are_changed_in_place(inner):
    trained, p, q, x = pair(), pair().requires_grad_(False), pair().requires_grad_(False), torch.randn(1, FEATURES)

    def function(x):
        hidden = trained(x)
        u, v = p(hidden), q(hidden)
        return u.add_(1).sin() * v.mul_(2)

    expected = gradients(function, trained, x)
    torch.testing.assert_close(gradients(compiled(function, inner), trained, x), expected)


@pytest.mark.parametrize("inner", INNER)
def test_a_frozen_region_that_adds_a_trained_residual_keeps_nothing_of_its_input(inner):
    trained, frozen, x = pair(), mlp().requires_grad_(False), torch.randn(40, FEATURES)

    def function(x):
        constant = x.sin()
        total = trained(x) + frozen(constant)
        constant.mul_(2)
        return total * constant

    expected = gradients(function, trained, x)
    torch.testing.assert_close(gradients(compiled(function, inner), trained, x), expected)
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("inner", INNER)
def test_a_teacher_of_a_few_rows_that_is_moved_after_its_student(inner):
    """Their projections are not packed: the teacher's has no gradients, and nothing of it is kept for any."""
    student, teacher, x = pair(), pair().requires_grad_(False), torch.randn(3, FEATURES)

    def function(x):
        results = student(x), teacher(x)
        teacher[1].weight.mul_(1)  # pyright: ignore
        return results

    def product(results):
        return results[0].sin() * results[1].cos()

    fast = compiled(function, inner)
    assert [result.requires_grad for result in fast(x)] == [True, False]
    expected = gradients(lambda x: product(function(x)), student, x)
    torch.testing.assert_close(gradients(lambda x: product(fast(x)), student, x), expected)
    assert latest().count("linear") == 2


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("overwritten", ["input", "weight"])
def test_a_norm_without_gradients_that_is_overwritten_behind_a_trained_region(inner, overwritten):
    """The region's gradients need the norm's result; with the norm in it, it would keep what that was computed from."""
    trained, norm, x = mlp(), nn.LayerNorm(FEATURES).requires_grad_(False), torch.randn(40, FEATURES)

    def function(x):
        stream = x.sin()
        total = stream + trained(norm(stream))
        (stream if overwritten == "input" else norm.weight).mul_(1)
        return total * stream

    expected = gradients(function, trained, x)
    torch.testing.assert_close(gradients(compiled(function, inner), trained, x), expected)
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("inner", INNER)
def test_a_sum_that_is_overwritten_through_a_view_behind_a_trained_region(inner):
    """The sum is an operator's result, which the next one's gradients need unless they have its norm."""
    trained, frozen, x = mlp(), mlp().requires_grad_(False), torch.randn(40, FEATURES)

    def function(x):
        total = x + frozen(rms_norm(x, (FEATURES,)))
        result = total + trained(rms_norm(total, (FEATURES,)))
        total[0].zero_()
        return result

    expected = gradients(function, trained, x)
    torch.testing.assert_close(gradients(compiled(function, inner), trained, x), expected)
    assert latest().count("mlp") == 2


class HalfOfSum(nn.Module):
    """ReLU by its values; at 0 its slope is a half."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + x.abs()) / 2


@pytest.mark.parametrize("inner", INNER)
def test_gradients_that_are_on_in_a_graph_that_begins_without_them(inner):
    """As in a closure of an optimizer. All that is hidden is 0 in the first row."""
    model, x = mlp(HalfOfSum()), torch.randn(5, FEATURES)
    model[1].bias.detach().zero_()  # pyright: ignore
    x[0] = 0

    def function(x):
        with torch.enable_grad():
            return model(x)

    def found(function):
        with torch.no_grad():
            result = function(x)
        return torch.autograd.grad(result.exp().sum(), list(model.parameters()))

    torch.testing.assert_close(found(compiled(function, inner)), found(function))
    assert latest().count("mlp") == 0


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("early_stop", [False, True])
def test_a_compiled_module_within_a_checkpoint(activation, early_stop):
    """Whose hooks count what is saved, also while the module is compiled."""
    model, x = mlp(activation), torch.randn(5, FEATURES, requires_grad=True)
    fast = compiled(model)

    def function(x):
        return checkpoint(fast, x, use_reentrant=False, early_stop=early_stop)  # pyright: ignore

    torch.testing.assert_close(gradients(function, model, x), gradients(model, model, x))
    assert latest().count("mlp") == 1


def test_compiling_saves_nothing_by_the_users_hooks():
    model, x, saved = mlp(nn.ReLU()), torch.randn(5, FEATURES, requires_grad=True), []
    fast = compiled(model)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fast(x)
        first = len(saved)
        fast(x)
    assert len(saved) == 2 * first


def test_hooks_may_be_forbidden():
    model, x = mlp(nn.ReLU()), torch.randn(5, FEATURES, requires_grad=True)
    with disable_saved_tensors_hooks("none here"):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_autograd(inner):
    model, x = mlp(), torch.randn(5, FEATURES)
    expected = gradients(model, model, x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled(lambda x: model(x).square().sum().backward(), inner)(x)
    torch.testing.assert_close(tuple(parameter.grad for parameter in model.parameters()), expected)


@pytest.mark.parametrize("inner", INNER)
def test_gradients_within_the_graph(inner):
    model, x = mlp(), torch.randn(5, FEATURES)
    expected = gradients(model, model, x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = compiled(lambda x: gradients(model, model, x), inner, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_gradients_of_gradients_within_the_graph(inner):
    """Operators have no second gradient, so what the first is taken of is left alone; the rest is not."""
    model, other, x = mlp(), pair(), torch.randn(5, FEATURES, requires_grad=True)

    def penalty(x):
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return other(y.square() + slope.square())

    expected = gradients(penalty, nn.ModuleList([model, other]), x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = gradients(compiled(penalty, inner, fullgraph=True), nn.ModuleList([model, other]), x)
    torch.testing.assert_close(found, expected)
    assert {refusal.reason for refusal in latest().refusals} == {RefusalReason.TRANSFORMED}
    assert (latest().count("mlp"), latest().count("linear")) == (0, 1)


@pytest.mark.parametrize("inner", INNER)
def test_branches(inner):
    first, second, x = mlp(), mlp(), torch.randn(5, FEATURES)
    both = nn.ModuleList([first, second])

    def function(x):
        return torch.cond(x.sum() > -1e9, lambda x: first(x), lambda x: second(x), (x,))

    found = torch.autograd.grad(compiled(function, inner)(x).square().sum(), list(both.parameters()), allow_unused=True)
    torch.testing.assert_close(found[: len(found) // 2], gradients(first, first, x))
    assert latest().count("mlp") == 2


class Nested(nn.Module):
    """An MLP that is a region of its own to the compiler."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def nested_and_plain() -> tuple[Callable, Callable, nn.ModuleList]:
    modules = nn.ModuleList(Nested() for _ in range(3))

    def nested(x):
        for module in modules:
            x = x + module(x)
        return x

    def plain(x):
        for module in modules:
            x = x + module.layers(x)  # pyright: ignore
        return x

    return nested, plain, modules


def test_nested_regions():
    nested, plain, _ = nested_and_plain()
    x = torch.randn(5, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(compiled(nested)(x), plain(x))
    assert latest().count("mlp") > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_nested_regions_without_gradients(frozen):
    nested, plain, modules = nested_and_plain()
    x = torch.randn(5, FEATURES)
    modules.requires_grad_(not frozen)

    def function(x):
        if frozen:
            return nested(x)
        with torch.no_grad():
            return nested(x)

    torch.testing.assert_close(compiled(function)(x), plain(x))
    assert latest().count("mlp") > 0
    assert latest().refusals == []


@pytest.mark.parametrize("rows", [1, 40])
def test_what_is_emitted_is_tracked(rows):
    """By rules, packing and residual sums: later rules ask whether gradients are wanted of what they find."""
    trained, p, q, frozen = mlp(), pair(), pair(), mlp().requires_grad_(False)
    emitted = []

    def is_tracked(node):
        value = node.meta.get("example_value")
        return any(each.requires_grad for each in (value if isinstance(value, tuple) else [value]) if each is not None)

    def backend(graph_module, example_inputs):
        rewrite(graph_module, options={"strategy": "streamed"})
        for node in graph_module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                emitted.append(node.name)
                assert is_tracked(node) == any(map(is_tracked, node.all_input_nodes)), node.name
        return graph_module.forward

    def function(x):
        return p(x).sin() * q(x).cos() + (trained(x) + frozen(x.sin()))

    x = torch.randn(rows, FEATURES)
    result = torch.compile(function, backend=backend)(x)
    torch.testing.assert_close(result, function(x))
    assert ("split" in emitted) == (rows == 1)
    assert ("add" in emitted) == (rows == 1), "a residual joins an operator of more rows"


def test_recomputing_leaves_autograd_out_again():
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    with torch._C._AutoDispatchBelowAutograd():
        chunked = backward.Chunked(torch.ones(4, 2), (x, weight), frozenset({0}), 2)
        found = backward.recompute(torch.nn.functional.linear, chunked, [True, True])
        assert torch._C._dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)
    torch.testing.assert_close(found, [weight.sum(0).expand(4, 3), x.sum(0).expand(2, 3)])


def test_nested_regions_that_gradients_are_wanted_of_are_left_alone():
    """Inductor of torch 2.13 gets some of them wrong, more of an operator's."""
    nested, plain, modules = nested_and_plain()
    x = torch.randn(5, FEATURES)
    torch.testing.assert_close(gradients(compiled(nested), modules, x), gradients(plain, modules, x))
    assert {match.module for match in latest().matches} <= {"0.layers"}, "which Dynamo inlines since torch 2.13"
    assert {refusal.reason for refusal in latest().refusals} == {RefusalReason.TRANSFORMED}
