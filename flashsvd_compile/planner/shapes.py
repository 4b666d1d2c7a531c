"""What the planner is told about a region: sizes only, in the graph's own symbols."""

from dataclasses import dataclass

import sympy


@dataclass(frozen=True)
class RegionShape:
    """Sizes that every region has.

    Attributes:
        ranks: rank of each projection by role, ``None`` for a dense one.
        features: output features of each projection by role.
        in_features: size of the last dimension of ``x``.
        itemsize: bytes of an element.
        device: ``"cpu"`` or ``"cuda"``.
    """

    ranks: dict[str, int | None]
    features: dict[str, int]
    in_features: sympy.Expr
    itemsize: int
    device: str

    @property
    def input_elements(self) -> sympy.Expr:
        """Elements of ``x``."""
        raise NotImplementedError

    def latent(self, role: str) -> int:
        """Rank-space elements a row needs for one projection; 0 when dense."""
        return self.ranks[role] or 0


@dataclass(frozen=True)
class LinearShape(RegionShape):
    """One projection of ``rows`` rows."""

    rows: sympy.Expr

    @property
    def input_elements(self) -> sympy.Expr:
        return self.rows * self.in_features


@dataclass(frozen=True)
class MlpShape(RegionShape):
    """An MLP over ``rows`` rows; gated when ``"gate"`` is one of the roles."""

    rows: sympy.Expr

    @property
    def input_elements(self) -> sympy.Expr:
        return self.rows * self.in_features


@dataclass(frozen=True)
class AttentionShape(RegionShape):
    """Attention of ``num_heads`` heads over ``batch`` items."""

    batch: sympy.Expr
    q_len: sympy.Expr
    kv_len: sympy.Expr
    num_heads: int
    num_kv_heads: int

    @property
    def input_elements(self) -> sympy.Expr:
        return self.batch * self.q_len * self.in_features
