"""What an index or mask tensor holds at each position, read off the operations that made it.

Models build masks out of index arithmetic: ``arange``, ``[None, :]``, comparisons, gathers, ``&``.
:class:`IndexAlgebra` runs those operations on symbols instead of numbers. The value of a tensor is its element at an
unknown position:

    arange(10)                          axis0                       (axis0: position along the last dimension)
    arange(10)[:, None]                 axis1
    q - 4                               axis1 - 4
    (k > q - 4) & (k <= q)              {axis0 - axis1 + 3 >= 0, axis1 - axis0 >= 0}
    padding                             padding[axis1, axis0]       (an entry of a tensor of unknown contents)
    padding[batch, k]                   padding[axis3, axis0]
    zeros.masked_fill(k > q, -inf)      -inf where {axis0 - axis1 - 1 >= 0} else 0

A tensor that no rule explains is an entry of itself. That is always true, so nothing is ever guessed.
"""

import sympy
import torch
from torch.fx import Node

from .axes import Dim, Window
from .index_rules import RULES
from .index_values import FALSE, TRUE, Choice, Entry, Position, Value, at, axis
from .mutation import mutated_arguments
from .values import number_of, shape_of, size_of, storage_of, tensor_of, value_of
from .views import layout_of, read_view
from .vocabulary import live_dropout, read


class IndexAlgebra:
    """Reads tensors of one graph and remembers what it read."""

    def __init__(self) -> None:
        self._values: dict[Node, Value] = {}

    def read(self, node: Node) -> Value:
        """The element of ``node`` at ``[..., axis1, axis0]``."""
        if node not in self._values:
            value = self._seen_through_view(node)
            if value is None:
                call = read(node)
                rule = None if call is None else RULES.get(call.op)
                value = None if rule is None or call is None else rule(self, node, call)
            self._values[node] = Entry.of(node) if value is None else value
        return self._values[node]

    def read_operand(self, operand: object, result: Node) -> Value | None:
        """An operand of an elementwise operation: a number, or a tensor that is broadcast to ``result``."""
        if isinstance(operand, bool):
            return TRUE if operand else FALSE
        if tensor_of(operand) is not None:
            assert isinstance(operand, Node)
            return self.read(operand) if _broadcasts(operand, result) else None
        number = value_of(operand) if isinstance(operand, Node) else operand
        if isinstance(number, (int, torch.SymInt)):
            return size_of(number)
        number = number_of(operand)
        return None if number is None else Choice.constant(number)

    def overwritten(self) -> bool:
        """Whether any tensor that was read is written in place somewhere in the graph: then the reading is void."""
        graphs = {node.graph for node in self._values}
        written = {written for graph in graphs for node in graph.nodes for written in mutated_arguments(node)}
        memories = set(map(storage_of, written)) - {None}
        return any(node in written or storage_of(node) in memories for node in self._values)

    def _seen_through_view(self, node: Node) -> Value | None:
        view, rank = read_view(node), len(shape_of(node) or ())
        own = layout_of([axis(dim).name for dim in reversed(range(rank))], node)
        if view is None or own is None or any(map(live_dropout, view.nodes)):
            return None
        layout = view.back(own)
        positions = [_position(dim) for dim in layout or ()]
        known = [position for position in positions if position is not None]
        if layout is None or len(known) < len(positions):
            return None
        return at(self.read(view.source), known)


def _position(dim: Dim) -> Position | None:
    """Position along a dimension that is a product of axes."""
    position: Position = sympy.Integer(0)
    for part in dim:
        if isinstance(part, Window):
            inner = _position(part.inner)
            offset = None if inner is None else inner + part.start
        else:
            offset = axis(int(part.name.removeprefix("axis"))) if part.name.removeprefix("axis").isdigit() else None
        if offset is None:
            return None
        position = position * part.size + offset
    return position


def _broadcasts(operand: Node, result: Node) -> bool:
    """Whether each dimension of ``operand`` is that of ``result``, or 1."""
    sizes, wanted = shape_of(operand), shape_of(result)
    if sizes is None or wanted is None or len(sizes) > len(wanted):
        return False
    return all(size in (1, want) for size, want in zip(reversed(sizes), reversed(wanted), strict=False))
