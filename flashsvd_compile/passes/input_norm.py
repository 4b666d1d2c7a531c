"""A norm before an operator that adds what the norm reads becomes its argument: the normed stream never exists at once.

Before::

    n = rms_norm(r, (features,), weight, eps)              # or any spelling that computes it
    s = flashsvd.mlp_v3(x=n, hidden_down=..., residual=r, ...)

After::

    s = flashsvd.mlp_v3(x=r, hidden_down=..., residual=r, x_norm="rms", x_norm_weight=weight, x_norm_eps=eps, ...)

The stream is alive either way, so its normed copy is memory saved. On a GPU an MLP's workspace may grow by as much
where the planner chose it: larger products run nearer to the roof. Norms whose weight has another dtype than the
stream stay, as the library has no kernel for them.
"""

import operator

from torch.fx import Graph, Node

from .. import ops
from ..ops.norm import argument_names
from ..options import Options, Strategy
from .emit import emit
from .norms import Norm, read_norm
from .order import Order
from .region import Deferred, in_schema_order
from .residual import OPERATORS, interrupted
from .values import shape_of, tensor_of, value_of
from .views import layout_of

KIND, WEIGHT, BIAS, EPS, _ = argument_names("x")


def absorb_norms(graph: Graph, options: Options) -> None:
    """Let the operators of a graph that already add their residuals normalise these themselves."""
    order = Order.of(graph.nodes)
    for node in order.position:
        if node.op == "call_function" and node.target in OPERATORS and node.kwargs.get("residual") is not None:
            _absorb(node, graph, order, options)


def _absorb(node: Node, graph: Graph, order: Order, options: Options) -> None:
    x, residual = node.kwargs["x"], node.kwargs["residual"]
    if (
        not isinstance(x, Node)
        or not isinstance(residual, Node)
        or x is residual
        or set(x.users) != {node}
        or node.kwargs.get("context") is not None
    ):
        return
    norm = _norm_of(x)
    if norm is None or norm.source is not residual or not _in_one_dtype(norm):
        return
    if interrupted([*norm.nodes, node], order) or node.kwargs.get("strategy") == Strategy.FUSED:
        return
    with graph.inserting_before(node):
        weight, bias = (v.build(graph) if isinstance(v, Deferred) else v for v in (norm.weight, norm.bias))
        described = {KIND: norm.kind, WEIGHT: weight, BIAS: bias, EPS: norm.eps}
        arguments = {**node.kwargs, "x": residual, **described}
        if node.target is ops.mlp and options.memory_budget is None and _is_on_gpu(residual):
            arguments["workspace_bytes"] = _larger(graph, node.kwargs["workspace_bytes"], residual)
    node.kwargs = in_schema_order(node.target, arguments)
    for old in reversed(norm.nodes):
        if not old.users:
            graph.erase_node(old)


def _norm_of(node: Node) -> Norm | None:
    """The norm over the last dimension whose result is ``node``."""
    shape, value = shape_of(node) or (), tensor_of(node)
    layout = layout_of((*(f"row {dim}" for dim in range(len(shape) - 1)), "feature"), node)
    return read_norm(node, layout, layout[-1], value.dtype) if layout and value is not None else None


def _in_one_dtype(norm: Norm) -> bool:
    """Whether weight and bias are of the stream's dtype, and the library has this norm."""
    stream = tensor_of(norm.source)
    vectors = [vector for vector in (norm.weight, norm.bias) if vector is not None]
    leaves = [leaf for v in vectors for leaf in (v.leaves if isinstance(v, Deferred) else (v,))]
    values = [tensor_of(leaf) for leaf in leaves]
    alike = stream is not None and all(value is not None and value.dtype == stream.dtype for value in values)
    return alike and (norm.kind == "layer" or norm.bias is None)


def _is_on_gpu(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.device.type != "cpu"


def _larger(graph: Graph, workspace_bytes: object, stream: Node) -> object:
    """The bound and the bytes of the stream: a number, or nodes that compute it where the shape is dynamic."""
    value = value_of(stream)
    elements = value.numel()
    if isinstance(elements, int) and isinstance(workspace_bytes, int):
        return workspace_bytes + elements * value.element_size()
    size = emit(graph, operator.mul, emit(graph, "numel", stream), value.element_size())
    return emit(graph, operator.add, size, workspace_bytes)
