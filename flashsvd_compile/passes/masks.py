"""Recovers causal, window and key-padding structure from the index arithmetic of an attention mask.

    before   mask = (k <= q) & (k > q - 4) & padding[batch, k]      [batch, 1, q_len, kv_len]
    after    window_left=3, window_right=0, key_padding=padding     [batch, kv_len]

    before   mask = (k <= q) & (documents[batch, q] == documents[batch, k])
    after    window_right=0, documents=documents                    [batch, kv_len]

A mask is either understood completely or passed on as it is (:attr:`MaskReading.residual`): an operator that gets only
the structure need never see a tensor with both a query and a key dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import sympy
import torch
from torch.fx import Graph, Node

from ..ops.attention_region import UNLIMITED
from .emit import emit
from .index_algebra import IndexAlgebra
from .index_values import AtLeastZero, Choice, Entry, InOrder, Predicate, SameEntry, Value, axis, minimum
from .values import example, number_of, shape_of, tensor_of
from .vocabulary import Call, read

KEY, QUERY, BATCH = axis(0), axis(1), axis(3)
BATCH_OF_ENTRY = axis(1)
_RANK = 4


@dataclass(frozen=True)
class KeyVector:
    """A vector over the keys, of each batch item or common to all.

    Attributes:
        node: the tensor that holds it.
        index: what to take of each dimension of ``node`` to get ``[batch, kv_len]`` or ``[kv_len]``.
        negated: its logical complement is meant.
    """

    node: Node
    index: tuple[int | slice, ...]
    negated: bool = False

    def build(self, graph: Graph, query: Node) -> Node:
        """``[batch, kv_len]`` at the graph's insertion point; ``query[batch, ...]`` tells the batch size."""
        vector = self.node
        if any(part != slice(None) for part in self.index):
            vector = emit(graph, "__getitem__", vector, self.index)
        if self.negated:
            vector = emit(graph, "logical_not", vector)
        if example(vector).dim() == 2:
            return vector
        return emit(graph, "expand", vector, _batch_size(graph, query), -1)


@dataclass(frozen=True)
class MaskReading:
    """What a mask says. ``MaskReading()`` lets every query see every key.

    Attributes:
        key_paddings: boolean vectors over the keys that must all be true.
        window_left, window_right: key ``j`` is visible to query ``i`` when ``i - left <= j <= i + right``; -1 lifts a
            side (see :class:`~flashsvd_compile.ops.attention_region.Attention`).
        documents: integers over the keys, as many as queries; a query sees only keys whose number is its own.
        residual: the whole mask where it was not understood; everything else is then at its default.
        reason: why there is a residual.
    """

    key_paddings: tuple[KeyVector, ...] = ()
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    documents: KeyVector | None = None
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


ReadMask = Callable[[Node, bool], MaskReading]
""":func:`read_mask`, maybe with a memory."""


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


def level_of(mask: Node) -> float | None:
    """The number that an additive mask holds wherever it is not 0, ``None`` where that is no one known number."""
    algebra = IndexAlgebra()
    value = algebra.read(mask)
    levels = {value.yes, value.no} - {0} if isinstance(value, Choice) else set()
    return levels.pop() if len(levels) == 1 and not algebra.overwritten() else None


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
    for clause in sorted(allowed.clauses, key=lambda clause: (isinstance(clause, InOrder), str(clause))):
        if isinstance(clause, InOrder):  # last: what it means depends on the documents
            reading = _windowed(reading, _distance(clause, reading.documents, sizes, algebra), sizes)
        else:
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


def _restricted(
    reading: MaskReading, clause: Entry | AtLeastZero | SameEntry, sizes: dict[sympy.Symbol, sympy.Expr]
) -> MaskReading:
    if isinstance(clause, AtLeastZero):
        return _windowed(reading, clause.position, sizes)
    if isinstance(clause, SameEntry):
        documents = _documents(clause, sizes)
        if reading.documents not in (None, documents):
            raise _NotUnderstood("documents packed in two ways at once")
        return replace(reading, documents=documents)
    return replace(reading, key_paddings=(*reading.key_paddings, _key_padding(clause, sizes)))


def _windowed(reading: MaskReading, position: sympy.Expr, sizes: dict[sympy.Symbol, sympy.Expr]) -> MaskReading:
    """Restrict the window by ``position >= 0``."""
    least = minimum(position, sizes)
    if least is not None and least.is_nonnegative:
        return reading
    slopes = position.coeff(QUERY), position.coeff(KEY)
    offset = sympy.expand(position - slopes[0] * QUERY - slopes[1] * KEY)
    if slopes not in ((1, -1), (-1, 1)):
        raise _NotUnderstood(f"the condition {position} >= 0 is not a window around the query")
    if not isinstance(offset, sympy.Integer) or offset < 0:
        raise _NotUnderstood(f"a window with offset {offset}, which is not a known number >= 0")
    side = "window_right" if slopes == (1, -1) else "window_left"
    before = getattr(reading, side)
    return replace(reading, **{side: int(offset) if before == UNLIMITED else min(before, int(offset))})


def _key_padding(entry: Entry, sizes: dict[sympy.Symbol, sympy.Expr]) -> KeyVector:
    """An entry that depends on the key and at most on the batch item."""
    vector = _vector(entry, KEY, sizes)
    if vector is None:
        raise _NotUnderstood(f"{entry.node.name} is not a vector over the keys")
    return vector


def _documents(clause: SameEntry, sizes: dict[sympy.Symbol, sympy.Expr]) -> KeyVector:
    """Equality of the entries of a query and of a key, of one vector that serves both."""
    pairs = (clause.first, clause.second), (clause.second, clause.first)
    for entry, other in pairs:
        of_queries, of_keys = _vector(entry, QUERY, sizes), _vector(other, KEY, sizes)
        value = tensor_of(entry.node)
        integers = value is not None and not value.is_floating_point()
        if of_keys is not None and of_keys == of_queries and integers and sizes.get(QUERY) == sizes.get(KEY):
            return of_keys
    raise _NotUnderstood(f"equal entries of {clause.first.node.name}, which are not documents of queries and keys")


def _distance(
    clause: InOrder, documents: KeyVector | None, sizes: dict[sympy.Symbol, sympy.Expr], algebra: IndexAlgebra
) -> sympy.Expr:
    """``second - first`` of positions that count up by one within each document: a difference of places.

    transformers compares the positions in packed documents, which begin where ``position_ids`` do not go on by one.
    """
    counted = None if documents is None else _counted_in(documents.node)
    value = None if counted is None else algebra.read(counted)
    for places in ((KEY, QUERY), (QUERY, KEY)):
        vectors = [_vector(entry, at, sizes) for entry, at in zip((clause.first, clause.second), places, strict=True)]
        if documents is None or not isinstance(value, Entry) or documents.index[-1] != slice(None):
            break
        if vectors == [_vector(value.at({BATCH_OF_ENTRY: BATCH}), KEY, sizes)] * 2:
            return places[1] - places[0] + clause.second.plus - clause.first.plus
    raise _NotUnderstood(f"an order of the entries of {clause.first.node.name}")


def _counted_in(documents: Node) -> Node | None:
    """The numbers whose runs ``documents`` counts: ``cumsum(diff(numbers, prepend=...) != 1)``."""
    count = read(documents)
    breaks = read(count.input) if count is not None and count.op == "cumsum" and _is_last(count, documents) else None
    steps = read(breaks.input) if breaks is not None and breaks.op == "ne" and number_of(breaks["other"]) == 1 else None
    if steps is None or steps.op != "diff" or not _is_last(steps, documents) or steps.get("n", 1) != 1:
        return None
    aligned = steps.get("append") is None and shape_of(steps.input) == shape_of(documents)
    return steps.input if aligned else None


def _is_last(call: Call, node: Node) -> bool:
    rank = len(shape_of(node) or ())
    return call.get("dim", -1) in (-1, rank - 1)


def _vector(entry: Entry, along: sympy.Symbol, sizes: dict[sympy.Symbol, sympy.Expr]) -> KeyVector | None:
    """An entry that depends on one axis and at most on the batch item."""
    shape = shape_of(entry.node) or ()
    parts = [_part(position, size, sizes) for position, size in zip(entry.index, shape, strict=True)]
    axes = [symbol for symbol, _ in parts if symbol is not None]
    return (
        KeyVector(entry.node, tuple(part for _, part in parts), entry.negated)
        if axes in ([along], [BATCH, along])
        else None
    )


def _part(
    position: sympy.Expr, size: sympy.Expr, sizes: dict[sympy.Symbol, sympy.Expr]
) -> tuple[sympy.Symbol | None, int | slice]:
    """The axis that ``position`` runs along and the part of a dimension of ``size`` that it covers."""
    if isinstance(position, sympy.Integer):
        return None, int(position)
    symbol, *others = [symbol for symbol in sizes if symbol in position.free_symbols] or [None]
    if symbol is None or others:
        raise _NotUnderstood(f"a vector read at {position}")
    # Mostly the symbol itself. A process's first sum of symbols has sympy import its tensors: as long as all the rules.
    start = sympy.Integer(0) if position == symbol else sympy.expand(position - symbol)
    length = sizes[symbol]
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
    size = example(query).shape[0]
    return size if isinstance(size, int) else emit(graph, "size", query, 0)
