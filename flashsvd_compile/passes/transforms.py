"""Low-rank projections within a transform of ``torch.func`` or the like: reported, not rewritten.

Operators have gradients and no rules beyond that. The rules do not even read such nodes: their example values are
batched or tracked, and hold only where the transform runs.
"""

from collections.abc import Iterable

from torch.fx import Node

from ..report import Refusal, RefusalReason
from .region import module_of
from .values import shape_of
from .vocabulary import is_call

_PROJECTIONS = ("linear", "addmm", "matmul", "einsum")


TRANSFORM = "a transform of torch.func, forward-mode differentiation, or what gradients of gradients are taken of"
NESTED_REGION = "a nested compile region that gradients are wanted of, which Inductor gets wrong (torch 2.13)"
"""``torch.compiler.nested_compile_region``: with the factors' own operations, too, but fewer of the gradients."""


def transformed_pairs(nodes: Iterable[Node], within: str) -> list[Refusal]:
    """One refusal for each pair of projections among these nodes that is narrow in between.

    Args:
        within: what they are in, :data:`TRANSFORM` or :data:`NESTED_REGION`.
    """
    pairs = list(filter(_is_low_rank, nodes))
    sites = [(module_of((node,), node), f"{node.name!r} is inside {within}") for node in pairs]
    return [Refusal(RefusalReason.TRANSFORMED, site, sentence) for site, sentence in sites]


def _is_low_rank(node: Node) -> bool:
    return _is_projection(node) and any(
        _is_projection(inner) and _width(inner) < min(_width(node), max(map(_width, inner.all_input_nodes)))
        for inner in node.all_input_nodes
        if inner.all_input_nodes
    )


def _is_projection(node: Node) -> bool:
    return is_call(node, *_PROJECTIONS)


def _width(node: Node) -> int:
    """Size of the last dimension; 0 where there is none or where it is a symbol."""
    shape = shape_of(node)
    return int(shape[-1]) if shape and shape[-1].is_Integer else 0
