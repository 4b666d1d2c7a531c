"""What an MLP operator computes, shared by its implementations."""

from typing import NamedTuple

from torch import Tensor

from . import projection as proj
from .projection import Projection


class Mlp(NamedTuple):
    """The projections of one MLP region; ``gate`` is ``None`` for a plain two-layer MLP."""

    hidden: Projection[Tensor]
    gate: Projection[Tensor] | None
    out: Projection[Tensor]

    @property
    def width(self) -> int:
        """Size of the hidden layer, d_ff."""
        return proj.out_features(self.hidden)

    @property
    def into_hidden(self) -> list[Projection[Tensor]]:
        """The projections that read the region's input: ``hidden``, then ``gate`` if there is one."""
        return [self.hidden] if self.gate is None else [self.hidden, self.gate]

    def merged(self) -> "Mlp":
        """The region with each projection dense whose factors cost more."""
        return Mlp(*(p and proj.merge_if_cheaper(p) for p in self))  # pyright: ignore[reportArgumentType]
