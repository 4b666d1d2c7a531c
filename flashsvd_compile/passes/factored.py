"""What the readers of projections return."""

from typing import NamedTuple

from torch.fx import Node

from ..ops.projection import Projection
from ..report import RefusalReason
from .axes import Dim
from .weights import Weight


class HeadFactors(NamedTuple):
    """Factors of each head's own: ``y[:, head] = x @ down[head] @ up[head]``.

    Attributes:
        down: ``[heads, in_features, rank]``.
        up: ``[heads, rank, dim]``.
    """

    down: Weight
    up: Weight


class Factored(NamedTuple):
    """A projection as it stands in the graph.

    Attributes:
        source: the tensor that is projected.
        projection: its factors; ``down`` is ``None`` for a dense one.
        nodes: the nodes between ``source`` and the result, the result last.
        rank: rank of the map, also where its factors are not two matrices; ``None`` when it is full.
        of_heads: the factors that ``projection`` is the product of, where each head has its own.
    """

    source: Node
    projection: Projection[Weight]
    nodes: tuple[Node, ...]
    rank: int | None = None
    of_heads: HeadFactors | None = None

    def rows(self, features: Dim) -> "Factored":
        """The projection of only those output features that a layout selects, in its order."""
        down, down_bias, up, up_bias = self.projection
        selected = Projection(down, down_bias, up.rows(features), up_bias and up_bias.rows(features))
        return self._replace(projection=selected)


class Obstacle(NamedTuple):
    """Why something that looks like a region is none."""

    reason: RefusalReason
    sentence: str


def unsupported(sentence: str) -> Obstacle:
    """Why an attention is left alone, whose projections may still be rewritten."""
    return Obstacle(RefusalReason.UNSUPPORTED_ATTENTION, sentence)
