"""Low-rank projections within a transform of ``torch.func`` or forward-mode differentiation: reported, not rewritten.

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


def transformed_pairs(nodes: Iterable[Node]) -> list[Refusal]:
    """One refusal for each pair of projections among these nodes that is narrow in between."""
    pairs = list(filter(_is_low_rank, nodes))
    sentence = "{!r} is inside a transform of torch.func or forward-mode differentiation"
    return [Refusal(RefusalReason.TRANSFORMED, module_of((node,), node), sentence.format(node.name)) for node in pairs]


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
