"""A residual that is added to an operator's result becomes its argument: the stream through a model is then one tensor.

Before::

    y = flashsvd.mlp_v3(x=norm(r), hidden_down=..., ...)
    s = r + y                                           # or y + r; a dropout that is off may stand between

After::

    s = flashsvd.mlp_v3(x=norm(r), hidden_down=..., residual=r, ...)

Inductor computes a sum again wherever it is used and keeps its summands instead, which are two tensors, and more where
sums of sums are used. Not where ``r`` is the operator's own input, as in models that normalise after the sum: there the
sum and the norm are one kernel, which is faster and as small.

With few rows one more pass costs a launch. There a GPU has a kernel that adds the residual to the last product of an
MLP or of a lone projection, which becomes a ``packed_linear_v2`` of one member for it; other operators stay.
"""

from typing import Any

import sympy
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from .emit import track
from .few_rows import has_few_rows, has_kernel
from .order import Order
from .packing import packed_arguments
from .region import in_schema_order
from .values import STORAGE, number_of, requires_grad, shape_of, size_of, storage_of, tensor_of
from .vocabulary import live_dropout, read

OPERATORS = (ops.attention, ops.mlp)
OF_FEW_ROWS = (ops.mlp, ops.linear)
"""Those with a kernel for few rows that adds a residual."""


def absorb_residuals(graph: Graph) -> None:
    """Let the attentions and MLPs of a graph that the rules have run over add their residuals themselves."""
    order = Order.of(graph.nodes)
    for node in order.position:
        if node.op == "call_function" and _adds(node) and node.kwargs.get("residual") is None:
            _absorb(node, graph, order)


def _adds(node: Node) -> bool:
    """Whether an operator's call can add a residual at no cost."""
    x = node.kwargs.get("x")
    if not isinstance(x, Node) or node.target not in (*OPERATORS, *OF_FEW_ROWS):
        return False
    if has_few_rows(x):
        return node.target in OF_FEW_ROWS and has_kernel(node, x)
    return node.target in OPERATORS


def _absorb(node: Node, graph: Graph, order: Order) -> None:
    replaced = _up_to_sum(node)
    residual = None if len(replaced) < 2 else _other_summand(replaced[-1], replaced[-2])
    if residual is None or residual is node.kwargs["x"] or not _alike(residual, node, replaced[-1]):
        return
    if interrupted(replaced, order):
        return
    target, arguments = taking_more(node)
    arguments = in_schema_order(target, {**arguments, "residual": residual})
    with graph.inserting_before(replaced[-1]):
        operator = graph.create_node("call_function", target, kwargs=arguments, name=node.name)
    operator.meta = dict(node.meta) | {STORAGE: storage_of(replaced[-1])}
    if requires_grad(replaced[-1]):
        track(operator)
    replaced[-1].replace_all_uses_with(operator)
    for old in reversed(replaced):
        graph.erase_node(old)


def taking_more(node: Node) -> tuple[OpOverload, dict[str, Any]]:
    """The operator that does what a call does and takes residuals and norms, and its arguments."""
    if node.target is ops.linear:
        return ops.packed_linear, packed_arguments([node])
    assert isinstance(node.target, OpOverload)
    return node.target, dict(node.kwargs)


def _up_to_sum(node: Node) -> list[Node]:
    """The operator's call, dropouts of its result that are off, and what uses it then; each the only user."""
    nodes = [node]
    while len(nodes[-1].users) == 1:
        nodes += nodes[-1].users
        call = read(nodes[-1])
        if call is None or call.op != "dropout" or call.input is not nodes[-2] or live_dropout(nodes[-1]):
            return nodes
    return nodes[:1]


def _other_summand(total: Node, summand: Node) -> Node | None:
    """``r`` where ``total`` is ``summand + r`` or ``r + summand``."""
    call = read(total)
    if call is None or call.op != "add" or number_of(call.get("alpha", 1)) != 1:
        return None
    summands = [call.input, call.get("other")]
    if summand not in summands:
        return None
    summands.remove(summand)
    (other,) = summands
    return other if isinstance(other, Node) and other is not summand else None


def _alike(residual: Node, node: Node, total: Node) -> bool:
    """Whether nothing is broadcast, promoted or moved."""
    if not shape_of(residual) == shape_of(node) == shape_of(total):
        return False
    added, result, summed = tensor_of(residual), tensor_of(node), tensor_of(total)
    if added is None or result is None or summed is None or is_traceable_wrapper_subclass(added):
        return False
    alike = added.dtype == result.dtype == summed.dtype and added.device == result.device
    return alike and _strides(result) == _strides(summed)


def _strides(tensor: Tensor) -> list[sympy.Expr | None]:
    """Strides by dimension; ``None`` where the size is 1 and any will do."""
    pairs = zip(map(size_of, tensor.shape), map(size_of, tensor.stride()), strict=True)
    return [None if size == 1 else stride for size, stride in pairs]


def interrupted(nodes: list[Node], order: Order) -> bool:
    """Whether anything is overwritten or a mode switched where the call would move past it, or by the sum itself."""
    first, last = min(order.position[node] for node in nodes), order.position[nodes[-1]]
    return any(first < order.position[node] <= last for node in (*order.writers, *order.switches))
