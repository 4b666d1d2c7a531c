"""What the planner is told about a region: sizes only, in the graph's own symbols."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import sympy

UNHINTED = 2048
FEW_ROWS = 16
"""Rows up to which a projection's time is that of reading its weights, or of launching."""


def is_bound_by_launches(rows: sympy.Basic) -> bool:
    """Whether projections of so many rows are better launched together; not where the number is unknown."""
    return isinstance(rows, sympy.Integer) and int(rows) <= FEW_ROWS


@dataclass(frozen=True)
class RegionShape:
    """Sizes that every region has. Hashable, so that plans can be remembered; dictionaries are compared, not hashed.

    Attributes:
        kind: what the report calls such a region.
        ranks: rank of each projection by role, ``None`` for a dense one.
        features: output features of each projection by role.
        in_features: size of the last dimension of ``x``.
        itemsize: bytes of an element.
        device: ``"cpu"`` or the name of a GPU.
        hints: sizes that the symbols had when the graph was traced. A choice is made for these and holds for all.
        differentiated: whether gradients may be asked for, and the model's own operations thus keep what they compute.
    """

    kind: ClassVar[str]
    ranks: dict[str, int | None] = field(hash=False)
    features: dict[str, int] = field(hash=False)
    in_features: sympy.Expr
    itemsize: int
    device: str
    hints: Mapping[sympy.Symbol, int] = field(hash=False)
    differentiated: bool = field(kw_only=True, default=False)

    @property
    def input_elements(self) -> sympy.Expr:
        """Elements of ``x``."""
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows, known when the graph is traced."""
        return self.input_elements == 0

    def latent(self, role: str) -> int:
        """Rank-space elements a row needs for one projection; 0 when dense."""
        return self.ranks[role] or 0

    def costs_more_than_dense(self, role: str, in_features: sympy.Expr | int) -> bool:
        """Whether two factors hold at least as many elements as their product."""
        features = self.features[role]
        return bool(self.latent(role) * (in_features + features) >= in_features * features)

    def at_hints(self, formula: sympy.Expr) -> float:
        """A formula's value at the traced sizes; a symbol without a hint counts as :data:`UNHINTED`."""
        formula = sympy.sympify(formula)
        sizes = dict.fromkeys(formula.free_symbols, UNHINTED) | dict(self.hints)
        number = formula.xreplace({symbol: sympy.sympify(size) for symbol, size in sizes.items()})
        assert isinstance(number, sympy.Expr)
        return float(number)


@dataclass(frozen=True)
class LinearShape(RegionShape):
    """One projection of ``rows`` rows."""

    kind: ClassVar[str] = "linear"
    rows: sympy.Expr

    @property
    def input_elements(self) -> sympy.Expr:
        return self.rows * self.in_features


@dataclass(frozen=True)
class MlpShape(RegionShape):
    """An MLP over ``rows`` rows; gated when ``"gate"`` is one of the roles."""

    kind: ClassVar[str] = "mlp"
    rows: sympy.Expr

    @property
    def into_hidden(self) -> tuple[str, ...]:
        """Roles of the projections into the hidden layer."""
        return ("hidden", "gate") if "gate" in self.ranks else ("hidden",)

    @property
    def input_elements(self) -> sympy.Expr:
        return self.rows * self.in_features


@dataclass(frozen=True)
class RankSpace:
    """Heads of an attention whose scores and values are taken in rank space.

    Attributes:
        head_dim: size of a head there, of queries, keys and values alike.
        num_kv_heads: heads of keys and values; 1 where all heads share one rank space.
    """

    head_dim: int
    num_kv_heads: int


@dataclass(frozen=True)
class AttentionShape(RegionShape):
    """Attention of ``num_heads`` heads over ``batch`` items.

    Attributes:
        masked: the model as written takes a mask, whatever is read out of it: causality, padding, or nothing at all.
        causal: queries see no later keys.
        rank_space: the heads of the absorbed form, or why there is none.
        products: elements of dense weights that the graph multiplies out of factors for this region, and that exist
            while it runs.
        shared: roles of projections that something else reads, too: the graph computes them for that, the region for
            itself again.
    """

    kind: ClassVar[str] = "attention"
    batch: sympy.Expr
    q_len: sympy.Expr
    kv_len: sympy.Expr
    num_heads: int
    num_kv_heads: int
    masked: bool = False
    causal: bool = False
    rank_space: RankSpace | str = "the factors are not known"
    products: int = 0
    shared: tuple[str, ...] = ()

    def rows_of(self, role: str) -> sympy.Expr:
        """Rows that a projection is computed for."""
        return self.batch * (self.kv_len if role in ("k", "v") else self.q_len)

    def with_dense(self, roles: Iterable[str]) -> "AttentionShape":
        """The region with the factors of some projections multiplied."""
        return replace(self, ranks=self.ranks | dict.fromkeys(roles))

    @property
    def absorbed(self) -> "AttentionShape":
        """The region that takes scores and values in rank space: wider or narrower heads, dense keys and values."""
        space = self.rank_space
        assert isinstance(space, RankSpace)
        queries, keys = self.num_heads * space.head_dim, space.num_kv_heads * space.head_dim
        return replace(
            self,
            ranks=self.ranks | {"k": None, "v": None},
            features=self.features | {"q": queries, "k": keys, "v": keys},
            num_kv_heads=space.num_kv_heads,
            rank_space="it is absorbed already",
            products=0,
        )

    @property
    def input_elements(self) -> sympy.Expr:
        return self.batch * self.q_len * self.in_features

    @property
    def is_empty(self) -> bool:
        return self.input_elements == 0 or self.kv_len == 0
