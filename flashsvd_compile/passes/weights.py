"""Weights of a projection as expressions over the graph's parameters.

The operators take every factor as ``[out_features, in_features]``; graphs hold them transposed, packed with others,
scaled by a diagonal. A :class:`Weight` remembers how to get from the parameter to the wanted view and is written into
the graph only when its region is replaced. It is never computed at compile time: a packed copy would go stale after
``load_state_dict``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map

from ..kernels.operands import shares_memory
from .axes import Dim, Window
from .emit import emit
from .values import example, tensor_of
from .vocabulary import read


@dataclass(frozen=True)
class Weight:
    """A parameter's node, or a call over other weights.

    Attributes:
        target: the node itself, a method's name or a function.
        arguments: for a call, what it is applied to; weights, nodes and plain values.
        value: example tensor of the result.
    """

    target: Node | str | Callable
    arguments: tuple[Any, ...]
    value: Tensor

    @classmethod
    def of(cls, node: Node) -> "Weight":
        """The weight that ``node`` holds; a transposition of a transposition is undone."""
        call = read(node)
        if is_transposition(node) and call is not None and is_transposition(call.input):
            inner = read(call.input)
            assert inner is not None
            return cls.of(inner.input)
        return cls(node, (), example(node))

    @classmethod
    def call(cls, target: str | Callable, *arguments: Any) -> "Weight":
        """A method or function over weights."""
        values = tree_map(lambda argument: argument.value if isinstance(argument, Weight) else argument, arguments)
        with torch.no_grad():
            value = getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values)
        return cls(target, arguments, value)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def leaves(self) -> tuple[Node, ...]:
        """The graph nodes this weight is made of."""
        if isinstance(self.target, Node):
            return (self.target,)
        return tuple(leaf for a in tree_leaves(self.arguments) if isinstance(a, Weight) for leaf in a.leaves)

    @property
    def is_materialised(self) -> bool:
        """Whether the graph computes it into memory of its own, where the nodes it is made of are only looked at."""
        leaves = (leaf for leaf in map(tensor_of, self.leaves) if leaf is not None)
        return not any(shares_memory(self.value, leaf) for leaf in leaves)

    @property
    def transposed(self) -> "Weight":
        """The transpose; of a transposed weight, the weight itself."""
        if self.target == "t":
            return self.arguments[0]
        if isinstance(self.target, Node) and is_transposition(self.target):
            call = read(self.target)
            assert call is not None
            return Weight.of(call.input)
        return Weight.call("t", self)

    def rows(self, features: Dim) -> "Weight":
        """The rows that a layout of the projection's features selects, in its order.

        ``((head, dim),)`` keeps all; a window out of packed projections becomes a slice; a window inside each head
        (as in ``[heads, 3, head_dim]`` packing) becomes a strided selection.
        """
        return self._selected(0, features)

    def _selected(self, position: int, features: Dim) -> "Weight":
        """The positions of one dimension that a layout selects; windows are cut from the outermost to the innermost."""
        if not any(isinstance(axis, Window) for axis in features):
            return self
        if len(features) == 1:
            window = features[0]
            assert isinstance(window, Window)
            part = Weight.call("narrow", self, position, int(window.start), _count(window.inner))
            return part._selected(position, window.inner)
        parts = Weight.call("unflatten", self, position, tuple(int(axis.size) for axis in features))
        for index, axis in enumerate(features, position):
            parts = parts._selected(index, (axis,))
        return Weight.call("flatten", parts, position, position + len(features) - 1)

    def build(self, graph: Graph, built: dict[int, Node]) -> Node:
        """The graph node of this weight, made at the graph's insertion point.

        Args:
            built: by identity, the nodes of weights that were made there before; what several share is made once.
        """
        if isinstance(self.target, Node):
            return self.target
        if id(self) not in built:
            parts = tree_map(
                lambda part: part.build(graph, built) if isinstance(part, Weight) else part, self.arguments
            )
            built[id(self)] = emit(graph, self.target, *parts)
        return built[id(self)]


def _count(dim: Dim) -> int:
    """Positions of a static dimension."""
    total = 1
    for axis in dim:
        total *= int(axis.size)
    return total


def is_transposition(node: object) -> bool:
    """Whether ``node`` swaps the two dimensions of a matrix."""
    call, value = read(node), tensor_of(node)
    if call is None or value is None or value.dim() != 2:
        return False
    if call.op in ("t", "mT"):
        return True
    if call.op == "transpose":
        return {call["dim0"] % 2, call["dim1"] % 2} == {0, 1}
    return call.op == "permute" and tuple(dim % 2 for dim in call["dims"]) == (1, 0)


_WEIGHT_OPERATIONS = {
    "t", "mT", "getattr", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze",
    "unsqueeze", "expand", "getitem", "narrow", "select", "slice", "split", "chunk", "contiguous", "clone", "to",
    "float", "half", "bfloat16", "type_as", "mul", "div", "add", "sub", "neg", "sqrt", "exp", "matmul", "linear",
    "einsum", "cat", "block_diag",
}  # fmt: skip
_MAX_DEPTH = 8


def is_weight(node: object, ndim: int | None = None) -> bool:
    """Whether ``node`` is a parameter or is computed out of parameters only.

    Tells ``x @ weight`` from a product of two activations. A placeholder of static shape counts: which one is the
    parameter cannot be told from the graph, and the rewrite is right either way.
    """
    value = tensor_of(node)
    if value is None or not value.is_floating_point() or not all(isinstance(size, int) for size in value.shape):
        return False
    if ndim is not None and value.dim() != ndim:
        return False
    return _made_of_parameters(node, _MAX_DEPTH)


def _made_of_parameters(node: object, depth: int) -> bool:
    assert isinstance(node, Node)
    if node.op in ("placeholder", "get_attr"):
        return True
    call = read(node)
    if call is None or call.op not in _WEIGHT_OPERATIONS or depth == 0:
        return False
    return all(_made_of_parameters(argument, depth - 1) for argument in node.all_input_nodes)
