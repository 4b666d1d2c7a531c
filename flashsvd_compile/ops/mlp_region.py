"""What an MLP operator computes, shared by its implementations."""

from typing import NamedTuple

from torch import Tensor

from . import projection as proj
from .norm import Norm
from .projection import Projection


class Mlp(NamedTuple):
    """One MLP region.

    Attributes:
        hidden, out: projections to the hidden layer and out of it.
        gate: what is activated in place of ``hidden`` and multiplied with it, or ``None`` for a plain two-layer MLP.
        activation: a name of :data:`~.activation.ACTIVATIONS`.
        x_norm: normalisation of the input, or ``None``.
    """

    hidden: Projection[Tensor]
    gate: Projection[Tensor] | None
    out: Projection[Tensor]
    activation: str = "gelu"
    x_norm: Norm | None = None

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
        hidden, out = proj.merge_if_cheaper(self.hidden), proj.merge_if_cheaper(self.out)
        return self._replace(hidden=hidden, gate=self.gate and proj.merge_if_cheaper(self.gate), out=out)
