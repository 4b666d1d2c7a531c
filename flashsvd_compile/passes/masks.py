"""Recovers causal, window and key-padding structure from the index arithmetic of an attention mask.

    before   mask = (k <= q) & (k > q - 4) & padding[batch, k]      [batch, 1, q_len, kv_len]
    after    window_left=3, window_right=0, key_padding=padding     [batch, kv_len]

A mask is either understood completely or passed on as it is (:attr:`MaskReading.residual`): an operator that gets only
the structure need never see a tensor with both a query and a key dimension.
"""

from dataclasses import dataclass, replace
from math import inf

import sympy
import torch
from torch.fx import Graph, Node

from ..ops.attention_region import UNLIMITED
from .emit import emit
from .index_algebra import IndexAlgebra
from .index_values import AtLeastZero, Choice, Clause, Entry, Predicate, SameEntry, Value, axis, minimum
from .values import shape_of, tensor_of

KEY, QUERY, BATCH = axis(0), axis(1), axis(3)
_RANK = 4


@dataclass(frozen=True)
class KeyPadding:
    """A boolean vector over the keys, of each batch item or common to all.

    Attributes:
        node: the tensor that holds it.
        index: what to take of each dimension of ``node`` to get ``[batch, kv_len]`` or ``[kv_len]``.
        negated: true marks keys that must not be attended to.
    """

    node: Node
    index: tuple[int | slice, ...]
    negated: bool

    def build(self, graph: Graph, query: Node) -> Node:
        """``[batch, kv_len]`` at the graph's insertion point; ``query[batch, ...]`` tells the batch size."""
        vector = self.node
        if any(part != slice(None) for part in self.index):
            vector = emit(graph, "__getitem__", vector, self.index)
        if self.negated:
            vector = emit(graph, "logical_not", vector)
        value = tensor_of(vector)
        assert value is not None
        if value.dim() == 2:
            return vector
        return emit(graph, "expand", vector, _batch_size(graph, query), -1)


@dataclass(frozen=True)
class MaskReading:
    """What a mask says. ``MaskReading()`` lets every query see every key.

    Attributes:
        key_paddings: vectors over the keys that must all be true.
        window_left, window_right: key ``j`` is visible to query ``i`` when ``i - left <= j <= i + right``; -1 lifts a
            side (see :class:`~flashsvd_compile.ops.attention_region.Attention`).
        residual: the whole mask where it was not understood; everything else is then at its default.
        reason: why there is a residual.
    """

    key_paddings: tuple[KeyPadding, ...] = ()
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    residual: Node | None = None
    reason: str = ""

    def materialize(self, graph: Graph, query: Node) -> Node | None:
        """The conjunction of the key paddings as ``[batch, kv_len]``, ``None`` if there are none.

        New nodes go to the graph's insertion point. ``query`` is any tensor whose first dimension is the batch.
        """
        vectors = [padding.build(graph, query) for padding in self.key_paddings]
        if not vectors:
            return None
        combined = vectors[0]
        for vector in vectors[1:]:
            combined = emit(graph, "logical_and", combined, vector)
        return combined


class _NotUnderstood(Exception):
    """Carries the reason of a residual out of the reading."""


def read_mask(mask: Node, floored: bool = False) -> MaskReading:
    """The structure of a mask broadcast to ``[batch, heads, q_len, kv_len]``: boolean (true: attend) or additive.

    An additive mask is equivalent to a boolean one when its low level is ``-inf``. With a finite level such as
    ``finfo.min`` a query that may see no key attends to all of them evenly, where a boolean mask gives zeros: then
    the mask is read only if every query provably sees a key, which key padding never allows. With ``floored``, so does
    ``-inf``, because the masked scores are raised to the least number afterwards.
    """
    try:
        return _read(mask, floored)
    except _NotUnderstood as reason:
        return MaskReading(residual=mask, reason=str(reason))


def _read(mask: Node, floored: bool) -> MaskReading:
    shape, tensor = shape_of(mask), tensor_of(mask)
    if shape is None or tensor is None or len(shape) > _RANK:
        raise _NotUnderstood("the mask's shape is unknown or has more than four dimensions")
    algebra = IndexAlgebra()
    allowed, finite = _allowed(algebra.read(mask), tensor.dtype)
    if algebra.overwritten():
        raise _NotUnderstood("a tensor that the mask is made of is written in place")
    sizes = {axis(dim): size for dim, size in enumerate(reversed(shape))}
    reading = MaskReading()
    for clause in sorted(allowed.clauses, key=str):
        reading = _restricted(reading, clause, sizes)
    if (finite or floored) and not _every_query_sees_a_key(reading, sizes):
        raise _NotUnderstood("an additive mask of finite level whose rows may be masked completely")
    return reading


def _allowed(value: Value, dtype: torch.dtype) -> tuple[Predicate, bool]:
    """The condition under which a key is visible, and whether a masked score stays finite."""
    if isinstance(value, Predicate):
        return value, False
    if isinstance(value, Entry) and dtype is torch.bool:
        return Predicate(frozenset({value})), False
    if not isinstance(value, Choice):
        raise _NotUnderstood("no rule explains the mask's values")
    visible, levels = value.where_zero, {value.yes, value.no} - {0}
    if visible is None or not all(level <= torch.finfo(dtype).min for level in levels):
        raise _NotUnderstood("an additive mask with other levels than 0 and -inf or the dtype's least number")
    return visible, bool(levels - {-inf})


def _restricted(reading: MaskReading, clause: Clause, sizes: dict[sympy.Symbol, sympy.Expr]) -> MaskReading:
    if isinstance(clause, AtLeastZero):
        return _windowed(reading, clause.position, sizes)
    if isinstance(clause, SameEntry):
        raise _NotUnderstood("packed documents: queries see the keys of their own document only")
    return replace(reading, key_paddings=(*reading.key_paddings, _key_padding(clause, sizes)))


def _windowed(reading: MaskReading, position: sympy.Expr, sizes: dict[sympy.Symbol, sympy.Expr]) -> MaskReading:
    """Restrict the window by ``position >= 0``."""
    least = minimum(position, sizes)
    if least is not None and least.is_nonnegative:
        return reading
    slopes = position.coeff(QUERY), position.coeff(KEY)
    offset = sympy.expand(position - slopes[0] * QUERY - slopes[1] * KEY)
    if slopes not in ((1, -1), (-1, 1)):
        raise _NotUnderstood(f"the condition {position} >= 0 is no window around the query")
    if not isinstance(offset, sympy.Integer) or offset < 0:
        raise _NotUnderstood(f"a window with offset {offset}, which is no known number >= 0")
    side = "window_right" if slopes == (1, -1) else "window_left"
    before = getattr(reading, side)
    return replace(reading, **{side: int(offset) if before == UNLIMITED else min(before, int(offset))})


def _key_padding(entry: Entry, sizes: dict[sympy.Symbol, sympy.Expr]) -> KeyPadding:
    """An entry that depends on the key and at most on the batch item."""
    shape = shape_of(entry.node) or ()
    parts = [_part(position, size, sizes) for position, size in zip(entry.index, shape, strict=True)]
    axes = [symbol for symbol, _ in parts if symbol is not None]
    if axes not in ([KEY], [BATCH, KEY]):
        raise _NotUnderstood(f"{entry.node.name} is no vector over the keys")
    return KeyPadding(entry.node, tuple(part for _, part in parts), entry.negated)


def _part(
    position: sympy.Expr, size: sympy.Expr, sizes: dict[sympy.Symbol, sympy.Expr]
) -> tuple[sympy.Symbol | None, int | slice]:
    """The axis that ``position`` runs along and the part of a dimension of ``size`` that it covers."""
    if isinstance(position, sympy.Integer):
        return None, int(position)
    symbol, *others = [symbol for symbol in sizes if symbol in position.free_symbols] or [None]
    if symbol is None or others:
        raise _NotUnderstood(f"a vector read at {position}")
    start, length = sympy.expand(position - symbol), sizes[symbol]
    if not isinstance(start, sympy.Integer) or start < 0:
        raise _NotUnderstood(f"a vector read at {position}")
    if start == 0 and size == length:
        return symbol, slice(None)
    if not isinstance(length, sympy.Integer):
        raise _NotUnderstood(f"a range of {length} out of {size} positions")
    return symbol, slice(int(start), int(start + length))


def _every_query_sees_a_key(reading: MaskReading, sizes: dict[sympy.Symbol, sympy.Expr]) -> bool:
    """A window holds the query's own position; without padding that is enough if there is such a key."""
    queries, keys = (sizes.get(symbol, sympy.Integer(1)) for symbol in (QUERY, KEY))
    own_key_exists = sympy.sympify(keys - queries).is_nonnegative
    return not reading.key_paddings and (reading.window_left == UNLIMITED or bool(own_key_exists))


def _batch_size(graph: Graph, query: Node) -> int | Node:
    value = tensor_of(query)
    assert value is not None
    size = value.shape[0]
    return size if isinstance(size, int) else emit(graph, "size", query, 0)
