"""What the planner is told of weights that a graph multiplies out, and its workspace as the graph computes it."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile.passes import attention as rule
from flashsvd_compile.passes.region import _workspace_bytes
from flashsvd_compile.planner import AttentionShape, Workspace, plan_attention

from .builder import rewritten, tensor
from .test_grouped_factors import DIM, HEADS, RANK, WIDTH, X, heads_of, merge


@pytest.fixture
def told(monkeypatch) -> list[AttentionShape]:
    """The shapes that were planned for."""
    shapes = []

    def plan(shape, options):
        shapes.append(shape)
        return plan_attention(shape, options)

    monkeypatch.setattr(rule, "plan_attention", plan)
    return shapes


def test_factors_of_each_head_are_products(told):
    def function(x, uq, vq, uk, vk, uv, vv, w):
        q, k, v = (torch.matmul(torch.matmul(x[:, None], u), w) for u, w in ((uq, vq), (uk, vk), (uv, vv)))
        return linear(merge(scaled_dot_product_attention(q, k, v)), w)

    shapes = ((HEADS, WIDTH, RANK), (HEADS, RANK, DIM))
    factors = [tensor(*shape, seed=seed) for seed in range(3) for shape in shapes]
    result = rewritten(function, X, *factors, tensor(WIDTH, WIDTH, seed=8))
    assert result.count("attention") == 1
    assert [shape.products for shape in told] == [3 * WIDTH * WIDTH]


def test_views_of_parameters_are_none(told):
    """Transposed factors, and dense keys and values packed in one weight."""

    def function(x, down, up, packed, w):
        q = x @ down.t() @ up
        k, v = linear(x, packed).split(WIDTH, -1)
        return linear(merge(scaled_dot_product_attention(*map(heads_of, (q, k, v)))), w)

    weights = ((RANK, WIDTH), (RANK, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, WIDTH))
    result = rewritten(function, X, *(tensor(*shape, seed=seed) for seed, shape in enumerate(weights)))
    assert result.count("attention") == 1
    assert [shape.products for shape in told] == [0]


@pytest.mark.parametrize("share", [Fraction(1), Fraction(3, 2)])
@pytest.mark.parametrize("beside", [0, 1000, 10**6])
@pytest.mark.parametrize("rows", [1, 77, 5000])
def test_a_graph_of_dynamic_sizes_computes_the_bound_of_the_plan(share, beside, rows):
    workspace = Workspace(4096, share, share + Fraction(1, 5), beside)
    x = torch.empty(rows, 3)
    graph = Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = x
    static = _workspace_bytes(graph, node, workspace)
    assert static == workspace.bytes_for(sympy.Integer(x.numel()))
    assert compiled_bound(lambda graph, node: _workspace_bytes(graph, node, workspace), x) == static


def compiled_bound(bound_of: Callable[[Graph, Node], object], x: torch.Tensor) -> int:
    """The bound that a graph computes of ``x``, whose sizes are symbols."""
    found = []

    def backend(module: GraphModule, _):
        graph = module.graph
        node = next(n for n in graph.nodes if isinstance(n.meta.get("example_value"), torch.Tensor))
        output = next(n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            bound = bound_of(graph, node)
        assert isinstance(bound, Node) or x.shape[0] == 1
        output.args = ((*output.args[0], bound),)
        module.recompile()

        def run(*arguments):
            *results, number = module(*arguments)
            found.append(number)
            return results

        return run

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(x)
    return found[0]
