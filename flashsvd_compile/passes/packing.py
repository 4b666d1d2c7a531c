"""Low-rank projections of the same few rows become one operator call: a launch costs more than it computes.

Before::

    q = flashsvd.linear_v1(x=x, w_down=q_down, w_up=q_up)
    k = flashsvd.linear_v1(x=x, w_down=k_down, w_up=k_up)

After::

    packed = flashsvd.packed_linear_v2(x=x, first_down=q_down, first_up=q_up, second_down=k_down, second_up=k_up)
    parts = packed.split([q_features, k_features], -1)
    q, k = parts[0].contiguous(), parts[1].contiguous()

With many rows nothing is gained, and what is packed stays in memory until all of it is used.
"""

import operator
from bisect import bisect
from itertools import groupby
from typing import Any

import sympy
from torch.fx import Graph, Node

from .. import ops
from ..ops.packed_linear import ROLES
from ..ops.projection import argument_names
from .ancestors import ancestors
from .emit import emit, with_example
from .few_rows import has_few_rows
from .order import Order
from .values import example_shape, requires_grad


def pack_projections(graph: Graph) -> None:
    """Pack the lone projections of a graph that the rules have run over."""
    order = Order.of(graph.nodes)
    for group in _groups(order):
        for start in range(0, len(group), len(ROLES)):
            first, *others = group[start : start + len(ROLES)]
            members = [first, *(other for other in others if not _is_computed_from(other, group))]
            if len(members) > 1:
                _pack(graph, members, order)


def _groups(order: Order) -> list[list[Node]]:
    """Projections of the same few rows, between which nothing is overwritten and no mode is switched; with gradients or
    without, as one call has them for all of its result and keeps every factor for them.
    """
    barriers = sorted(order.position[node] for node in (*order.writers, *order.switches))

    def stretch(node: Node) -> tuple[int, int, bool]:
        x = order.position[node.kwargs["x"]]  # pyright: ignore
        return bisect(barriers, order.position[node]), x, requires_grad(node)

    found = [node for node in order.position if node.target is ops.linear and _of_few_rows(node)]
    return [list(group) for _, group in groupby(sorted(found, key=stretch), key=stretch)]


def _of_few_rows(node: Node) -> bool:
    x = node.kwargs["x"]
    return isinstance(x, Node) and has_few_rows(x)


def _pack(graph: Graph, members: list[Node], order: Order) -> None:
    """Put the packed call where the first of the members is, whose users may come before the last.

    Of one row a part is contiguous as it is: a view, which autograd lets nobody change in place.
    """
    first = members[0]
    arguments = packed_arguments(members)
    tracked = order.gradients_at(first) and any(map(requires_grad, arguments.values()))
    for argument in arguments.values():
        _hoist(argument, first)
    with graph.inserting_before(first):
        packed = graph.create_node("call_function", ops.packed_linear, kwargs=arguments, name="packed")
        with_example(packed, ops.packed_linear, tracked)
        parts = emit(graph, "split", packed, [int(features_of(member)) for member in members], -1)
        for index, member in enumerate(members):
            part = emit(graph, "clone" if tracked else "contiguous", emit(graph, operator.getitem, parts, index))
            part.meta = member.meta | part.meta
            member.replace_all_uses_with(part)
    for member in members:
        graph.erase_node(member)


def packed_arguments(members: list[Node]) -> dict[str, Any]:
    """Arguments of ``packed_linear`` for up to three calls of ``linear`` of the same input, all of them nodes."""
    arguments = {"x": members[0].kwargs["x"]}
    for role, member in zip(ROLES, members, strict=False):
        for name, own in zip(argument_names(role), argument_names("w"), strict=True):
            if member.kwargs.get(own) is not None:
                arguments[name] = member.kwargs[own]
    return arguments


def features_of(member: Node) -> sympy.Expr:
    """Size of a projection's last dimension."""
    return example_shape(member)[-1]


def _is_computed_from(member: Node, group: list[Node]) -> bool:
    """Whether a projection's factors depend on another projection of its group."""
    return any(node in group for node in ancestors([member], through=lambda node: group[0] < node))


def _hoist(weight: Node, before: Node) -> None:
    """Move what computes a factor in front of a node, which it does not depend on."""
    behind = (weight, *ancestors([weight], through=lambda node: before < node))
    for node in sorted(node for node in behind if before < node):
        before.prepend(node)
