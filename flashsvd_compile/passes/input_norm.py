"""A norm before an operator that adds what the norm reads becomes its argument: the normed stream never exists at once.

Before::

    n = rms_norm(r, (features,), weight, eps)              # or any spelling that computes it
    s = flashsvd.mlp_v3(x=n, hidden_down=..., residual=r, ...)

After::

    s = flashsvd.mlp_v3(x=r, hidden_down=..., residual=r, x_norm="rms", x_norm_weight=weight, x_norm_eps=eps, ...)

The stream is alive either way, so its normed copy is memory saved. On a GPU a workspace in which rows are normalised
may grow by almost as much where the planner chose it: larger products run nearer to the roof. Norms whose weight has
another dtype than the stream stay, as the library has no kernel for them.

With few rows on a GPU a norm costs a launch that waits for the one before it and that the next one waits for. There
the first products of an MLP or of lone projections take a root mean square norm in passing, whatever it is a norm of;
of several rows where there is a kernel for that (``kernels/gemv_hopper.py``).
"""

import operator
from fractions import Fraction
from typing import Any

from torch.fx import Graph, Node

from .. import ops
from ..ops.lifting import MAX_PROJECTED_RANK
from ..ops.norm import argument_names
from ..options import Options, Strategy
from .emit import emit
from .few_rows import has_kernel_with_norm
from .norms import Norm, read_norm
from .order import Order
from .region import Deferred, in_schema_order, is_on_gpu
from .residual import OPERATORS, interrupted, taking_more
from .safety import overwritten_behind
from .values import requires_grad, tensor_of, value_of
from .views import layout_of_rows

KIND, WEIGHT, BIAS, EPS, _ = argument_names("x")
OF_STREAM = Fraction(15, 16)
"""Of the stream, what the workspace grows by. The rest is left to the rotation's tables: of 4096 features and heads of
128, those of one item are a 16th of its stream."""


def absorb_norms(graph: Graph, options: Options) -> None:
    """Let the operators of a graph normalise what they read: the residuals that they add, or few rows."""
    order = Order.of(graph.nodes)
    for node in order.position:
        x = node.kwargs.get("x")
        if node.op != "call_function" or not isinstance(x, Node):
            continue
        few = has_kernel_with_norm(node, x)
        if few or _adds_its_input(node):
            _absorb(node, x, few, graph, order, options)


def _adds_its_input(node: Node) -> bool:
    """Whether a call may add what its input is a norm of, and is not faster without the norm."""
    kwargs = node.kwargs
    if node.target not in OPERATORS or kwargs.get("context") is not None or kwargs.get("strategy") == Strategy.FUSED:
        return False
    return isinstance(kwargs.get("residual"), Node)


def _absorb(node: Node, x: Node, few: bool, graph: Graph, order: Order, options: Options) -> None:
    """Let the call take the norm that ``x`` is: of its residual, or any root mean square one of ``few`` rows."""
    residual = node.kwargs.get("residual")
    if x is residual or set(x.users) != {node} or node.kwargs.get(KIND, "none") != "none":
        return
    norm = _norm_of(x, residual if isinstance(residual, Node) else None)
    if norm is None or not (norm.source is residual or (few and norm.kind == "rms")):
        return
    if not _in_one_dtype(norm) or interrupted([*norm.nodes, node], order):
        return
    if requires_grad(node) and overwritten_behind(node, [norm.source, *_leaves(norm)], order):
        return  # gradients need the norm's result, and the call would keep what it is a norm of
    target, arguments = taking_more(node)
    with graph.inserting_before(node):
        weight, bias = (v.build(graph) if isinstance(v, Deferred) else v for v in (norm.weight, norm.bias))
        arguments |= {"x": norm.source, KIND: norm.kind, WEIGHT: weight, BIAS: bias, EPS: norm.eps}
        if options.memory_budget is None and is_on_gpu(x) and not few and _normalises_in_workspace(target, arguments):
            arguments["workspace_bytes"] = _larger(graph, node.kwargs["workspace_bytes"], norm.source)
    node.target, node.kwargs = target, in_schema_order(target, arguments)
    for old in reversed(norm.nodes):
        if not old.users:
            graph.erase_node(old)


def _normalises_in_workspace(target: object, arguments: dict[str, Any]) -> bool:
    """Whether an operator on a GPU normalises some rows at a time. Attention whose rank space stays on chip reads a
    normed input as a whole.
    """
    if target is not ops.attention:
        return target is ops.mlp
    downs = [tensor_of(down) for role in "qkv" if isinstance(down := arguments.get(f"{role}_down"), Node)]
    ranks = [len(down) for down in downs if down is not None]
    if len(ranks) < len("qkv") or arguments.get("strategy") == Strategy.MERGED:
        return False
    return max(ranks[1:]) > MAX_PROJECTED_RANK


def _norm_of(node: Node, stream: Node | None) -> Norm | None:
    """The norm over the last dimension whose result is ``node``; of ``stream``, if that is on the way."""
    layout, value = layout_of_rows(node), tensor_of(node)
    return read_norm(node, layout, layout[-1], value.dtype, stream) if layout and value is not None else None


def _in_one_dtype(norm: Norm) -> bool:
    """Whether weight and bias are of the stream's dtype, and the library has this norm."""
    stream = tensor_of(norm.source)
    values = [tensor_of(leaf) for leaf in _leaves(norm)]
    alike = stream is not None and all(value is not None and value.dtype == stream.dtype for value in values)
    return alike and (norm.kind == "layer" or norm.bias is None)


def _leaves(norm: Norm) -> list[Node]:
    """What weight and bias are read from."""
    vectors = [vector for vector in (norm.weight, norm.bias) if vector is not None]
    return [leaf for v in vectors for leaf in (v.leaves if isinstance(v, Deferred) else (v,))]


def _larger(graph: Graph, workspace_bytes: object, stream: Node) -> object:
    """The bound and most bytes of the stream: a number, or nodes that compute it where the shape is dynamic."""
    value = value_of(stream)
    elements, parts = value.numel(), OF_STREAM.denominator
    part_bytes = value.element_size() * OF_STREAM.numerator
    if isinstance(elements, int) and isinstance(workspace_bytes, int):
        return workspace_bytes + elements // parts * part_bytes
    part = emit(graph, operator.floordiv, emit(graph, "numel", stream), parts)
    return emit(graph, operator.add, emit(graph, operator.mul, part, part_bytes), workspace_bytes)
