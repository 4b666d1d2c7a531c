"""From the heads of an attention forward to their concatenation and on to the output projection."""

from typing import NamedTuple

from torch.fx import Node

from .affine import read_affine
from .axes import extent, named, regroup
from .factored import Factored
from .factors import read_projection
from .scores import Core
from .values import shape_of
from .views import peel_rows, read_view, trace
from .vocabulary import live_dropout


class Merge(NamedTuple):
    """The concatenated heads, ``[batch, len, heads * dim]`` or ``[batch * len, heads * dim]``."""

    tensor: Node
    nodes: tuple[Node, ...]


def read_merges(core: Core) -> list[Merge]:
    """Follow the heads forwards while they are only rearranged; each concatenation met, the last one last."""
    node, nodes = core.result.node, ()
    merges = [Merge(node, nodes)] if _concatenates(node, core) else []
    while len(node.users) == 1:
        (user,) = node.users
        view = read_view(user)
        if view is None or view.source is not node:
            break
        node, nodes = user, (*nodes, user)
        if _concatenates(node, core):
            merges.append(Merge(node, nodes))
    return merges


def _concatenates(node: Node, core: Core) -> bool:
    """Whether ``node`` is the core's result as ``[batch, len, heads * dim]`` or ``[batch * len, heads * dim]``."""
    shape, layout = shape_of(node), core.result.layout
    batch, query, head, value = (named(layout, name) for name in ("batch", "query", "head", "value"))
    rows = extent(batch), extent(query)
    if shape is None or shape[:-1] not in (rows, (rows[0] * rows[1],)):
        return False
    wanted = regroup([*batch, *query, *head, *value], shape)
    if wanted is None or wanted[-1] != head + value:
        return False
    return trace(node, wanted)[:2] == (core.result.node, layout)


def read_out(core: Core, merges: list[Merge]) -> tuple[Factored | None, Node, tuple[Node, ...]]:
    """The output projection as ``(projection, result, nodes)``; without one, the concatenated heads themselves."""
    best: tuple[Factored | None, Node, tuple[Node, ...]] | None = None
    node, nodes = merges[-1]
    rows = [(shape_of(merge.tensor) or ())[:-1] for merge in merges]
    layout = core.result.layout
    batched = extent(named(layout, "batch")), extent(named(layout, "query"))
    while len(node.users) == 1:
        (node,) = node.users
        if live_dropout(node):
            break
        found, shape = _projection_behind(node), shape_of(node)
        if found is not None:
            factored, passed = found
            into = any(merge.tensor is factored.source for merge in merges)
            if into and shape is not None and shape[:-1] in (*rows, batched):
                best = factored, node, nodes + passed
        elif not _may_be_between_factors(node):
            break
    if best is not None:
        return best
    whole = [merge for merge in merges if len(shape_of(merge.tensor) or ()) == 3] or merges
    tensor, nodes = whole[-1]
    return None, tensor, nodes


def _projection_behind(node: Node) -> tuple[Factored, tuple[Node, ...]] | None:
    for tensor, views in peel_rows(node):
        if read_affine(tensor) is not None:
            factored = read_projection(tensor)
            return None if factored is None else (factored, factored.nodes + views[::-1])
    return None


def _may_be_between_factors(node: Node) -> bool:
    return any(read_affine(tensor, diagonal=True) is not None for tensor, _ in peel_rows(node))
