"""What stands in each column of a tensor, as products of columns of other tensors.

A node's last dimension is followed through everything that moves columns about: slices, ``cat``, ``stack``, views,
casts. Sums and products of tensors are recorded, not computed:

    x[..., 4:]                        column i is x[i + 4]
    cat((-x[..., 4:], x[..., :4]))    column i is -x[i + 4], then x[i - 4]
    x * cos + rotated * sin           column i is cos[i] * x[i] - sin[i] * x[i + 4], ...

Columns are numbered with numpy arrays, so that each operation on tensors is the same operation on arrays.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.fx import Node

from .values import example, shape_of, size_of, tensor_of, value_of
from .vocabulary import CASTS, Call, read

LEADING = 3
"""Batch, heads and positions, in any order, stand before the columns."""


class Term(NamedTuple):
    """For each column of a tensor, one product: which column of each factor, and its sign (0: no such product)."""

    columns: tuple[np.ndarray, ...]
    sign: np.ndarray


Terms = dict[tuple[Node, ...], Term]
"""Sum of products by their factors, which are sorted by name."""


class Columns:
    """Reads the columns of tensors up from the result of a rotation."""

    def __init__(self, result: Node, cut_tables: bool = False):
        """With ``cut_tables``, part of a tensor without the result's heads is a tensor of its own.

        That tells cosines from sines where both are parts of one tensor.
        """
        self._result = result
        self._cut_tables = cut_tables
        self._read: dict[tuple[Node, bool], Terms] = {}
        self.products: list[Node] = []
        """The multiplications of two tensors that were found."""

    def read(self, node: Node, rotated: bool) -> Terms:
        """What stands in each column of ``node``.

        Above the products (``rotated=False``) only operations that move columns are followed: a product found there is
        some other part of the model, such as the norm of queries.
        """
        if (node, rotated) not in self._read:
            call = read(node)
            rule = None if call is None or self._is_cut(node, call) else _RULES.get(call.op)
            terms = None if rule is None or call is None else rule(self, node, call, rotated)
            if terms is not None and any(term.sign.shape != _feature_shape(node) for term in terms.values()):
                terms = None  # the columns are no dimension of their own any more
            self._read[node, rotated] = _leaf(node) if terms is None else terms
        return self._read[node, rotated]

    def _is_cut(self, node: Node, call: Call) -> bool:
        return self._cut_tables and call.op in _PARTS and not _same_leading(node, self._result)

    def narrows_to_result(self, node: Node) -> bool:
        """Whether a cast gives the dtype that the rotation ends in."""
        return example(node).dtype == example(self._result).dtype

    def source(self, leaf: Node) -> Node | None:
        """The first node that holds the rotated columns, and no others, as they are in ``leaf``."""
        shape = shape_of(self._result)
        whole = {
            node
            for (node, _), terms in self._read.items()
            if terms.keys() == {(leaf,)} and shape_of(node) == shape and _is_range(terms[leaf,])
        }
        first = [node for node in whole if not any(other in whole for other in node.all_input_nodes)]
        return first[0] if len(first) == 1 else None

    def offset(self, source: Node) -> int:
        """Column of the leaf where ``source`` begins."""
        (term,) = next(terms for (node, _), terms in self._read.items() if node is source).values()
        return int(term.columns[0].flat[0])

    def between(self, source: Node) -> tuple[Node, ...]:
        """The nodes that lead from ``source`` to the result."""
        known = {source: True}
        found: list[Node] = []

        def leads(node: Node) -> bool:
            if node not in known:
                visited = (node, True) in self._read or (node, False) in self._read or tensor_of(node) is None
                above = [leads(argument) for argument in node.all_input_nodes] if visited else []
                known[node] = any(above)
                if known[node]:
                    found.append(node)
            return known[node]

        leads(self._result)
        return tuple(found)


def _is_range(term: Term) -> bool:
    columns, sign = term.columns[0], term.sign
    return columns.ndim == 1 and bool((sign == 1).all()) and bool((np.diff(columns) == 1).all())


def _features(node: Node) -> int:
    """Number of trailing dimensions that are columns: one, or more while they are taken apart."""
    return max(1, example(node).dim() - LEADING)


def _feature_shape(node: Node) -> tuple[int, ...] | None:
    shape = [size_of(size) for size in example(node).shape[-_features(node) :]]  # Dynamo may know a symbol's number
    return tuple(map(int, shape)) if all(size.is_Integer for size in shape) else None


def _leaf(node: Node) -> Terms:
    value = tensor_of(node)
    shape = _feature_shape(node) if value is not None and value.dim() > 0 else None
    if shape is None:
        return {}
    count = int(np.prod(shape))
    return {(node,): Term((np.arange(count).reshape(shape),), np.ones(shape, int))}


def _moved(terms: Terms, move: Callable[[np.ndarray], np.ndarray]) -> Terms:
    return {leaves: Term(tuple(map(move, term.columns)), move(term.sign)) for leaves, term in terms.items()}


def _same_leading(before: Node, after: Node) -> bool:
    leading = [(shape_of(node) or ())[: -_features(node)] for node in (before, after)]
    return leading[0] == leading[1]


def _feature_dim(node: Node, dim: object) -> int | None:
    """``dim`` counted among the columns' dimensions, ``None`` if it is none of them."""
    if not isinstance(dim, int):
        return None
    rank = example(node).dim()
    dim = dim % rank - (rank - _features(node))
    return dim if dim >= 0 else None


def _sum(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    left, right = call.input, call["other"]
    if not rotated or tensor_of(left) is None or tensor_of(right) is None or call.get("alpha", 1) != 1:
        return None
    first, second = columns.read(left, True), columns.read(right, True)
    if call.op == "sub":
        second = {leaves: Term(term.columns, -term.sign) for leaves, term in second.items()}
    if first.keys() & second.keys() or not first or not second:
        return None
    shapes = {term.sign.shape for term in (*first.values(), *second.values())}
    return first | second if len(shapes) == 1 else None


def _product(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    left, right = call.input, call["other"]
    if not rotated or tensor_of(left) is None or tensor_of(right) is None:
        return None
    shape = _feature_shape(node)
    first, second = columns.read(left, False), columns.read(right, False)
    if len(first) != 1 or len(second) != 1 or shape is None:
        return None
    factors = [
        (leaf, *(np.broadcast_to(array, shape) for array in (term.columns[0], term.sign)))
        for terms in (first, second)
        for (leaf,), term in terms.items()
    ]
    factors.sort(key=lambda factor: factor[0].name)
    columns.products.append(node)
    leaves, indices, signs = zip(*factors, strict=True)
    return {leaves: Term(indices, signs[0] * signs[1])}


def _negation(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    terms = columns.read(call.input, rotated)
    return {leaves: Term(term.columns, -term.sign) for leaves, term in terms.items()}


def _index(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    """``x[..., a:b:c]``, and members of what ``chunk``, ``split`` and ``unbind`` return."""
    source, index = call.input, call["index"]
    if tensor_of(source) is None:
        return _member(columns, source, index)
    index = index if isinstance(index, tuple) else (index,)
    rank, features = example(source).dim(), _features(source)
    if any(part is None or isinstance(part, (Node, torch.SymInt)) for part in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (rank - len(index) + 1) + index[at + 1 :]
    leading, trailing = index[: rank - features], index[rank - features :]
    if any(part != slice(None) for part in leading) or not all(map(_is_static, trailing)):
        return None
    return _moved(columns.read(source, False), lambda array: array[trailing])


def _is_static(part: object) -> bool:
    if isinstance(part, slice):
        return all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step))
    return type(part) is int


def _member(columns: Columns, parts: object, index: object) -> Terms | None:
    call, values = read(parts), value_of(parts) if isinstance(parts, Node) else None
    if call is None or call.op not in ("chunk", "split", "unbind") or not isinstance(index, int) or not values:
        return None
    dim = _feature_dim(call.input, call.get("dim", 0))
    if dim is None:
        return None
    terms = columns.read(call.input, False)
    if call.op == "unbind":
        return _moved(terms, lambda array: np.take(array, index, axis=dim))
    ends = np.cumsum([part.shape[dim - _features(call.input)] for part in values])
    return _moved(terms, lambda array: np.split(array, ends[:-1], axis=dim)[index])


def _slice(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    """ATen's form of a slice along one dimension."""
    dim = _feature_dim(call.input, call.get("dim", 0))
    part = slice(call.get("start"), call.get("end"), call.get("step", 1))
    if dim is None or not _is_static(part):
        return None
    return _moved(columns.read(call.input, False), lambda array: array[(slice(None),) * dim + (part,)])


def _narrow(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    dim, start, length = _feature_dim(call.input, call["dim"]), call["start"], call["length"]
    if dim is None or type(start) is not int or type(length) is not int:
        return None
    return _moved(columns.read(call.input, False), lambda array: array.take(range(start, start + length), axis=dim))


def _select(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    dim, index = _feature_dim(call.input, call["dim"]), call["index"]
    if dim is None or type(index) is not int:
        return None
    return _moved(columns.read(call.input, False), lambda array: array.take(index, axis=dim))


def _join(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    """``cat`` and ``stack``; a product that only some of the parts have is absent in the others."""
    parts, rank = call["tensors"], example(node).dim()
    if not isinstance(parts, (tuple, list)) or any(tensor_of(part) is None for part in parts):
        return None
    dim = _feature_dim(node, call.get("dim", 0))
    if dim is None or any(example(part).dim() != rank - (call.op == "stack") for part in parts):
        return None
    terms = [columns.read(part, rotated) for part in parts]
    if not all(terms):
        return None
    join = np.stack if call.op == "stack" else np.concatenate
    joined: Terms = {}
    for leaves in dict.fromkeys(leaves for part in terms for leaves in part):
        present = [part.get(leaves) or _absent(part, len(leaves)) for part in terms]
        indices = (join([term.columns[factor] for term in present], axis=dim) for factor in range(len(leaves)))
        joined[leaves] = Term(tuple(indices), join([term.sign for term in present], axis=dim))
    return joined


def _absent(terms: Terms, factors: int) -> Term:
    nothing = np.zeros_like(next(iter(terms.values())).sign)
    return Term((nothing,) * factors, nothing)


def _regrouped(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    shape = _feature_shape(node)
    if tensor_of(call.input) is None or shape is None or not _same_leading(call.input, node):
        return None
    return _moved(columns.read(call.input, rotated), lambda array: array.reshape(shape))


def _transposed(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    first, second = _feature_dim(call.input, call["dim0"]), _feature_dim(call.input, call["dim1"])
    if first is None or second is None:
        return None
    return _moved(columns.read(call.input, rotated), lambda array: array.swapaxes(first, second))


def _repeat(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    dim, repeats = _feature_dim(call.input, call.get("dim")), call["repeats"]
    if dim is None or type(repeats) is not int:
        return None
    return _moved(columns.read(call.input, rotated), lambda array: array.repeat(repeats, axis=dim))


def _cast(columns: Columns, node: Node, call: Call, rotated: bool) -> Terms | None:
    """A cast to a wider dtype changes nothing; one to a narrower dtype is allowed behind the rotation."""
    before, after = example(call.input), example(node)
    if before.device != after.device or not after.dtype.is_floating_point:
        return None
    widens = torch.promote_types(before.dtype, after.dtype) == after.dtype
    return columns.read(call.input, rotated) if widens or (rotated and columns.narrows_to_result(node)) else None


_PARTS = ("getitem", "slice", "narrow", "select")

_Rule = Callable[[Columns, Node, Call, bool], Terms | None]

_RULES: dict[str, _Rule] = {
    "add": _sum,
    "sub": _sum,
    "mul": _product,
    "neg": _negation,
    "getitem": _index,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "cat": _join,
    "stack": _join,
    **dict.fromkeys(
        ("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "flatten", "unflatten", "contiguous", "clone"),
        _regrouped,
    ),
    "transpose": _transposed,
    "repeat_interleave": _repeat,
    **dict.fromkeys(CASTS, _cast),
}
