"""Recognises rotary position embedding, however its arithmetic is spelled.

    before   x * cos + cat((-x[..., 8:], x[..., :8]), -1) * sin         half split
             stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) ...    interleaved
             cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)        tables of half the width
             cat((rotation of x[..., :r], x[..., r:]), -1)              partial
    after    Rope(x, cos, sin, interleaved)

There is no pattern for each spelling. :mod:`.columns` reads what stands in each column of the result, whatever the way
there: ``cos[i] * x[i] - sin[i] * x[i + 8]``. That is compared with the rotation that the operator computes.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch.fx import Graph, Node

from .axes import Axis
from .columns import LEADING, Columns, Terms
from .emit import emit
from .values import example, shape_of, tensor_of
from .views import layout_of, read_view
from .vocabulary import is_call, live_dropout

_LAST_OPERATIONS = (
    "add",
    "sub",
    "cat",
    "flatten",
    "reshape",
    "view",
    "reshape_as",
    "view_as",
    "to",
    "half",
    "bfloat16",
    "type_as",
)
"""What a rotation can end with: everything else is refused without a closer look."""


@dataclass(frozen=True)
class Table:
    """Cosines or sines as the graph holds them.

    Attributes:
        node: ``[batch or 1, len, width]``, ``[len, width]`` or one of them with a dimension of size 1 for the heads.
        heads_dim: where in ``node`` that dimension is, if it is there.
        columns: column of ``node`` for each rotated column.
        dtype: dtype in which the graph computes the rotation; the table is cast to it.
    """

    node: Node
    heads_dim: int | None
    columns: tuple[int, ...]
    dtype: torch.dtype

    def build(self, graph: Graph) -> Node:
        """``[batch or 1, len, rotary_dim]`` at the graph's insertion point."""
        table = self.node if self.heads_dim is None else emit(graph, "select", self.node, self.heads_dim, 0)
        if example(table).dim() == 2:
            table = emit(graph, "unsqueeze", table, 0)
        table = self._spread(graph, table)
        return table if example(table).dtype == self.dtype else emit(graph, "to", table, self.dtype)

    def _spread(self, graph: Graph, table: Node) -> Node:
        first, distinct = self.columns[0], len(set(self.columns))
        if distinct < example(table).shape[-1]:
            table = emit(graph, "narrow", table, -1, first, distinct)
        if self.columns == _repeated(first, distinct):
            return emit(graph, "repeat_interleave", table, 2, -1)
        if self.columns == _tiled(first, distinct):
            return emit(graph, torch.cat, (table, table), -1)
        return table


class Rope(NamedTuple):
    """One rotation, as :func:`~flashsvd_compile.ops.attention_region.rotate` computes it.

    Attributes:
        source: what is rotated; batch, heads, positions in any order, then ``head_dim``.
        cos, sin: the tables; their width is the number of columns that are rotated, from the first one on.
        interleaved: pairs are neighbours instead of halves.
        nodes: the nodes between source and result, in order of execution, the result last.
    """

    source: Node
    cos: Table
    sin: Table
    interleaved: bool
    nodes: tuple[Node, ...]


def read_rope(node: Node, heads_dim: int = 1, narrowed: torch.dtype | None = None) -> Rope | None:
    """The rotation whose result is ``node``, a tensor of four dimensions, or ``None``.

    Args:
        node: the rotated queries or keys.
        heads_dim: 1 for ``[batch, heads, len, head_dim]``, 2 for ``[batch, len, heads, head_dim]``.
        narrowed: the dtype that queries and keys are cast to behind the rotation, the result's own by default.

    Casts to a wider dtype inside the rotation are followed if the result is narrowed to the source's dtype again: the
    tables are then cast to the wider one, and the rotation is computed in it. Where something before the rotation has
    widened the source to float32 already, it need not be of the narrow dtype either.
    """
    result = tensor_of(node)
    if result is None or result.dim() != LEADING + 1 or not is_call(node, *_LAST_OPERATIONS):
        return None
    dtypes = (result.dtype,) if narrowed is None else (narrowed, torch.float32)
    whole, cut = Columns(node), Columns(node, cut_tables=True)
    return _read(node, heads_dim, whole, dtypes) or _read(node, heads_dim, cut, dtypes)


def _read(node: Node, heads_dim: int, columns: Columns, dtypes: tuple[torch.dtype, ...]) -> Rope | None:
    terms = columns.read(node, rotated=True)
    turned = [leaves for leaves in terms if len(set(leaves)) == 2]
    rotated = set.intersection(*map(set, turned)) if len(turned) == 2 else set()
    if len(rotated) != 1:
        return None
    (x,) = rotated
    source = columns.source(x)
    dtype = reduce(torch.promote_types, (example(product).dtype for product in columns.products))
    ends = () if source is None else (example(source).dtype, example(node).dtype)
    if source is None or any(end not in dtypes for end in ends) or dtype not in (*dtypes, torch.float32):
        return None
    pairing = _pairing(terms, x, columns.offset(source))
    if pairing is None:
        return None
    tables = [_table(leaf, used, node, heads_dim, dtype) for leaf, used in (pairing.cos, pairing.sin)]
    if tables[0] is None or tables[1] is None:
        return None
    return Rope(source, tables[0], tables[1], pairing.interleaved, columns.between(source))


class _Pairing(NamedTuple):
    """Which table columns turn which pairs."""

    cos: tuple[Node, tuple[int, ...]]
    sin: tuple[Node, tuple[int, ...]]
    interleaved: bool


def _pairing(terms: Terms, x: Node, offset: int) -> _Pairing | None:
    """``out[i] = cos[i] * x[i] -+ sin[i] * x[partner]``, and ``out[i] = x[i]`` behind the rotated columns."""
    tables: dict[bool, tuple[Node, tuple[int, ...]]] = {}
    interleaved = False
    for leaves, term in terms.items():
        if leaves.count(x) != 1:
            return None
        (width,) = term.sign.shape
        taken = np.arange(width)[term.sign != 0]
        columns = dict(zip(leaves, term.columns, strict=True))
        partner = columns[x][taken] - offset
        if leaves == (x,):
            if not (np.array_equal(partner, taken) and (term.sign[taken] == 1).all()):
                return None
            continue
        rotary = len(taken)
        if not rotary or rotary % 2 or not np.array_equal(taken, np.arange(rotary)):
            return None
        (table,) = (leaf for leaf in leaves if leaf is not x)
        same = np.array_equal(partner, taken)
        if not same:
            kind = _kind_of_pairs(partner, term.sign[taken])
            if kind is None:
                return None
            interleaved = kind
        elif not (term.sign[taken] == 1).all():
            return None
        tables[same] = table, tuple(map(int, columns[table][taken]))
    if len(tables) != 2 or len(tables[True][1]) != len(tables[False][1]):
        return None
    rest = set(range(len(tables[True][1]), next(iter(terms.values())).sign.shape[0]))
    passing = terms.get((x,))
    if rest != (set() if passing is None else set(np.flatnonzero(passing.sign).tolist())):
        return None
    return _Pairing(tables[True], tables[False], interleaved)


def _kind_of_pairs(partner: np.ndarray, sign: np.ndarray) -> bool | None:
    """Whether pairs are neighbours; ``None`` for another pairing or direction."""
    index, half = np.arange(len(partner)), len(partner) // 2
    if np.array_equal(partner, (index + half) % len(partner)) and np.array_equal(sign, np.where(index < half, -1, 1)):
        return False
    if np.array_equal(partner, index ^ 1) and np.array_equal(sign, np.where(index % 2 == 0, -1, 1)):
        return True
    return None


def _table(leaf: Node, columns: tuple[int, ...], node: Node, heads_dim: int, dtype: torch.dtype) -> Table | None:
    """The table behind a factor that is broadcast to ``node``."""
    first, distinct = columns[0], len(set(columns))
    if columns not in (_range(first, distinct), _tiled(first, distinct), _repeated(first, distinct)):
        return None
    shape, whole = shape_of(leaf) or (), shape_of(node) or ()
    missing, positions = len(whole) - len(shape), 3 - heads_dim
    padded = (1,) * missing + shape
    if missing < 0 or padded[heads_dim] != 1 or padded[positions] != whole[positions]:
        return None
    names = ["batch", "position", "position", "column"]
    names[heads_dim] = "head"
    source = _without_heads(leaf, names[missing:])
    if source is not None:
        return Table(source, None, columns, dtype)
    at = heads_dim - missing
    is_batch = at == 0  # [1, len, width]: the heads' dimension serves as that of the batch
    return Table(leaf, None if is_batch or at < 0 else at, columns, dtype)


def _without_heads(leaf: Node, names: list[str]) -> Node | None:
    """``[batch or 1, len, width]`` or ``[len, width]`` behind the views that made room for the heads.

    Queries and keys often make room separately; behind that they share one table.
    """
    layout, node = layout_of(names, leaf), leaf
    while layout is not None and (view := read_view(node)) is not None and not live_dropout(node):
        node, layout = view.source, view.back(layout)
        if layout is None or any(len(dim) > 1 or not all(isinstance(axis, Axis) for axis in dim) for dim in layout):
            return None  # a part of a larger table is used as it is
        order = ["".join(axis.name for axis in dim if isinstance(axis, Axis)) for dim in layout]
        if order[:-2] in ([], [""], ["batch"]) and order[-2:] in (["position", "column"], ["", "column"]):
            return node
    return None


def _range(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def _tiled(first: int, count: int) -> tuple[int, ...]:
    return _range(first, count) * 2


def _repeated(first: int, count: int) -> tuple[int, ...]:
    return tuple(first + index // 2 for index in range(2 * count))
