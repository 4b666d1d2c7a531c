"""From the queries, keys and values of an attention back to the projections that compute them."""

from typing import NamedTuple

import torch
from torch.fx import Node

from .affine import read_scaling
from .axes import Layout, extent, named, visible
from .factored import Factored
from .factors import read_projection
from .norms import Norm, read_norm
from .per_head import read_per_head
from .rope import Rope, read_rope
from .scores import Operand
from .views import trace, with_rows


class Member(NamedTuple):
    """One of q, k, v followed back to its projection.

    Attributes:
        factored: the projection, its rows restricted to what the core reads.
        heads: number of heads.
        scale: constant factor met on the way.
        rope: rotation met on the way, or ``None``.
        norm: norm met on the way, before the rotation, or ``None``.
        nodes: all nodes between the projection's input and the core.
    """

    factored: Factored
    heads: int
    scale: float
    rope: Rope | None
    norm: Norm | None
    nodes: tuple[Node, ...]


def read_member(operand: Operand, dtype: torch.dtype) -> Member | None:
    """Follow q, k or v back through views, constant factors, one rotation and then one norm to its projection.

    Rotation and norm may leave float32 behind where the core casts its operands to ``dtype``, as autocast does.
    """
    node, layout = operand
    nodes: tuple[Node, ...] = ()
    scale, rope, norm = 1.0, None, None
    while norm is None:
        node, layout, passed = trace(node, layout)
        nodes = passed + nodes
        scaling = read_scaling(node)
        if scaling is not None and scaling[1]:
            nodes, scale = (node, *nodes), scale * scaling[1]
            node = scaling[0]
        elif rope is None and (rope := _read_rope(node, layout, operand.layout, dtype)) is not None:
            nodes = rope.nodes + nodes
            node = rope.source
        elif (norm := read_norm(node, layout, named(operand.layout, "dim", "value"), dtype)) is not None:
            nodes = norm.nodes + nodes
            node, layout, passed = trace(norm.source, layout)
            nodes = passed + nodes
        else:
            break
    found = _projection_per_head(node, layout, operand.layout) or _projection_of_heads(node, layout, operand.layout)
    if found is None:
        return None
    factored, heads = found
    if norm is not None and norm.heads not in (None, heads):
        return None
    return Member(factored, heads, scale, rope, norm, factored.nodes + nodes)


def _read_rope(node: Node, layout: Layout, operand: Layout, dtype: torch.dtype) -> Rope | None:
    """The rotation of ``[batch, heads, len, dim]`` or ``[batch, len, heads, dim]``, of nothing in another order."""
    batch, position = named(operand, "batch"), named(operand, "query", "key")
    axes = [visible(dim) for dim in layout]
    heads_dim = 2 if any(axis in position for dim in axes[1:2] for axis in dim) else 1
    others = [dim for at, dim in enumerate(axes) if at != 3 - heads_dim]
    if any(axis not in batch for dim in axes[:1] for axis in dim) or any(a in position for dim in others for a in dim):
        return None
    return read_rope(node, heads_dim, dtype)


_HEADS = ((), ("head",), ("head.outer",), ("head.outer", "head.inner"))
"""All heads, one for each group of queries' heads, or groups of heads with others packed between them."""


def _projection_of_heads(node: Node, layout: Layout, operand: Layout) -> tuple[Factored, int] | None:
    """The projection that computes ``node``, if its features are heads by dims and its rows batch by position."""
    *rows, features = layout
    batch, position, dim = (named(operand, *names) for names in (("batch",), ("query", "key"), ("dim", "value")))
    if tuple(axis for row in rows for axis in row) != batch + position:
        return None
    axes = visible(features)
    heads = axes[: len(axes) - len(dim)]
    if axes[len(heads) :] != dim or tuple(axis.name for axis in heads) not in _HEADS:
        return None
    factored = read_projection(node)
    source = None if factored is None else with_rows(factored.source, (extent(batch), extent(position)))
    if factored is None or source is None:
        return None
    tensor, views = source
    selected = factored.rows(features)
    return selected._replace(source=tensor, nodes=views + selected.nodes), int(extent(heads))


def _projection_per_head(node: Node, layout: Layout, operand: Layout) -> tuple[Factored, int] | None:
    """The same, where the result of the projection itself has a dimension of heads."""
    found = read_per_head(node)
    if found is None:
        return None
    dims = dict(zip(found.letters, layout, strict=True))
    wanted = {"b": ("batch",), "h": ("head",), "m": ("query", "key"), "d": ("dim", "value")}
    if any(dims[letter] != named(operand, *names) for letter, names in wanted.items()):
        return None
    return found.factored, int(extent(dims["h"]))
