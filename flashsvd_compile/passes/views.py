"""Views: operations that move or drop elements but compute nothing, read as functions on axes.

Attention code reshapes, transposes, splits and expands in a hundred ways. Here each of them is one of five primitive
steps, and :func:`trace` follows a tensor backwards through any number of them while it keeps track of which axis of the
source each axis of the tensor is:

    sdpa query [batch][head][pos][dim] <- transpose(1, 2) <- view(b, l, h, d) <- linear [batch][pos][head dim]
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import sympy
import torch
from torch.fx import Node

from .axes import Axis, Dim, Layout, Size, Window, extent, ratio, regroup
from .values import shape_of, size_of, tensor_of, value_of
from .vocabulary import CASTS, Call, read


class Step(Protocol):
    def back(self, layout: Layout) -> Layout | None:
        """Layout of the step's input, given that of its output; ``None`` when the step cannot be undone."""
        ...


class Regroup(NamedTuple):
    """Same elements in the same order under another shape: view, reshape, flatten, squeeze, contiguous ..."""

    shape: tuple[Size, ...]

    def back(self, layout: Layout) -> Layout | None:
        return regroup([axis for dim in layout for axis in dim], self.shape)


class Permute(NamedTuple):
    """Output dimension ``i`` is input dimension ``order[i]``."""

    order: tuple[int, ...]

    def back(self, layout: Layout) -> Layout | None:
        source: list[Dim] = [()] * len(layout)
        for dim, position in zip(layout, self.order, strict=True):
            source[position] = dim
        return tuple(source)


class Repeat(NamedTuple):
    """Dimensions of size 1 repeated; their axes do not exist in the source."""

    dims: tuple[int, ...]

    def back(self, layout: Layout) -> Layout | None:
        return tuple(() if position in self.dims else dim for position, dim in enumerate(layout))


class Interleave(NamedTuple):
    """``repeat_interleave``: each position of a dimension ``times`` times in a row."""

    dim: int
    times: Size

    def back(self, layout: Layout) -> Layout | None:
        count = ratio(extent(layout[self.dim]), self.times)
        parts = regroup(list(layout[self.dim]), (count, self.times))
        return None if parts is None else (*layout[: self.dim], parts[0], *layout[self.dim + 1 :])


class Narrow(NamedTuple):
    """A range of one dimension."""

    dim: int
    start: Size
    size: Size

    def back(self, layout: Layout) -> Layout | None:
        if extent(layout[self.dim]) == self.size:
            return layout
        window = Window(layout[self.dim], self.start, self.size)
        return (*layout[: self.dim], (window,), *layout[self.dim + 1 :])


class Select(NamedTuple):
    """One position of one dimension, which disappears."""

    dim: int
    index: Size
    size: Size

    def back(self, layout: Layout) -> Layout | None:
        return (*layout[: self.dim], (Window((), self.index, self.size),), *layout[self.dim :])


class View(NamedTuple):
    """A view node as steps from ``source``, in the order of execution."""

    source: Node
    steps: tuple[Step, ...]
    nodes: tuple[Node, ...]

    def back(self, layout: Layout) -> Layout | None:
        """Layout of ``source``, given that of the view; ``None`` when a step cannot be undone."""
        before: Layout | None = layout
        for step in reversed(self.steps):
            before = None if before is None else step.back(before)
        return before


class Trace(NamedTuple):
    """Where a chain of views began: the source, its layout, and the nodes passed."""

    source: Node
    layout: Layout
    nodes: tuple[Node, ...]


def layout_of(names: Sequence[str], node: Node) -> Layout | None:
    """One axis per dimension of a node's tensor; axes of size 1 are left out."""
    shape = shape_of(node)
    if shape is None or len(shape) != len(names):
        return None
    return tuple(() if size == 1 else (Axis(name, size),) for name, size in zip(names, shape, strict=True))


def layout_of_rows(node: Node) -> Layout | None:
    """An axis ``feature`` for the last dimension, one of its own for each before it."""
    rank = len(shape_of(node) or ())
    return layout_of((*(f"row {dim}" for dim in range(rank - 1)), "feature"), node) if rank else None


def trace(node: Node, layout: Layout) -> Trace:
    """Follow ``node`` backwards through views as far as its layout can be kept track of."""
    nodes: tuple[Node, ...] = ()
    while (view := read_view(node)) is not None:
        before = view.back(layout)
        if before is None:
            break
        node, layout, nodes = view.source, before, nodes + view.nodes
    return Trace(node, layout, nodes)


def peel_rows(node: Node) -> list[tuple[Node, tuple[Node, ...]]]:
    """``node`` and the tensors behind it that hold the same rows under other leading dimensions.

    Each comes with the view nodes between it and ``node``.
    """
    found: list[tuple[Node, tuple[Node, ...]]] = [(node, ())]
    nodes: tuple[Node, ...] = ()
    while (view := read_view(node)) is not None and all(isinstance(step, Regroup) for step in view.steps):
        before, after = shape_of(view.source), shape_of(node)
        if not before or not after or before[-1] != after[-1]:
            break
        node, nodes = view.source, nodes + view.nodes
        found.append((node, nodes))
    return found


def with_rows(node: Node, rows: tuple[Size, ...]) -> tuple[Node, tuple[Node, ...]] | None:
    """``node`` or a tensor of the same rows behind it, with leading dimensions ``rows``, and the views in between.

    The views come in order of execution.
    """
    for tensor, views in peel_rows(node):
        shape = shape_of(tensor)
        if shape is not None and shape[:-1] == rows:
            return tensor, views[::-1]
    return None


def read_view(node: Node) -> View | None:
    """``node`` as a view of another node's tensor, or ``None``.

    A dropout counts as a view; :mod:`~flashsvd_compile.passes.safety` refuses regions with one that is not off.
    """
    call = read(node)
    if call is None:
        return None
    if call.op == "cat":
        return _joined_with_nothing(node, call)
    if call.op == "getitem" and isinstance(call.input, Node) and not isinstance(value_of(call.input), torch.Tensor):
        return _member_of_tuple(node, call)
    source = call.input
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None or _reinterprets(node, call):
        return None
    steps = _steps(call, before, after, node)
    return None if steps is None else View(source, steps, (node,))


def _reinterprets(node: Node, call: Call) -> bool:
    """Whether it is ``view(dtype)``: other numbers, and no gradients, from the same bits."""
    return call.op == "view" and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))


def _joined_with_nothing(node: Node, call: Call) -> View | None:
    """One tensor and empty ones, as the first keys of a cache are, or what a rotation of all columns leaves."""
    parts = call["tensors"] if isinstance(call["tensors"], list | tuple) else ()
    whole = [part for part in parts if sympy.S.Zero not in (shape_of(part) or ())]
    before = shape_of(whole[0]) if len(whole) == 1 else None
    if before is None or before != shape_of(node) or not _keeps_type(whole[0], node):
        return None
    made = (part for part in parts if part is not whole[0] and part.op in ("call_function", "call_method"))
    return View(whole[0], (Regroup(before),), (node, *made))


_REGROUPING = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
    "contiguous",
}  # fmt: skip
_UNCHANGED = {"clone", "alias", "dropout"}


def _steps(call: Call, before: tuple[Size, ...], after: tuple[Size, ...], node: Node) -> tuple[Step, ...] | None:
    rank = len(before)
    if call.op in _REGROUPING | _UNCHANGED or (call.op in CASTS and _keeps_type(call.input, node)):
        return (Regroup(before),)
    if call.op == "transpose":
        return _transposed(rank, call["dim0"], call["dim1"])
    if call.op == "t":
        return _transposed(rank, 0, 1) if rank == 2 else None
    if call.op == "mT":
        return _transposed(rank, -1, -2)
    if call.op == "permute":
        return (Permute(tuple(dim % rank for dim in call["dims"])),)
    if call.op == "movedim":
        return _moved(rank, call["source"], call["destination"])
    if call.op in ("expand", "expand_as"):
        return _expanded(before, after)
    if call.op == "repeat_interleave" and isinstance(call.get("dim"), int) and isinstance(call["repeats"], int):
        dim = call["dim"] % rank
        return (Interleave(dim, ratio(after[dim], before[dim])),)
    if call.op == "narrow":
        return _narrowed(before, call["dim"], call["start"])
    if call.op == "slice" and call.get("step", 1) == 1:
        return _narrowed(before, call.get("dim", 0), call.get("start") or 0)
    if call.op == "select":
        return _selected(before, call["dim"], call["index"])
    if call.op == "getitem":
        return _indexed(before, after, call["index"])
    return None


def _keeps_type(source: Node, node: Node) -> bool:
    before, after = tensor_of(source), tensor_of(node)
    return before is not None and after is not None and (before.dtype, before.device) == (after.dtype, after.device)


def _transposed(rank: int, first: int, second: int) -> tuple[Step, ...]:
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return (Permute(tuple(order)),)


def _moved(rank: int, source, destination) -> tuple[Step, ...]:
    sources = [source] if isinstance(source, int) else list(source)
    destinations = [destination] if isinstance(destination, int) else list(destination)
    placed = {to % rank: of % rank for of, to in zip(sources, destinations, strict=True)}
    others = iter(dim for dim in range(rank) if dim not in placed.values())
    return (Permute(tuple(placed[dim] if dim in placed else next(others) for dim in range(rank))),)


def _expanded(before: tuple[Size, ...], after: tuple[Size, ...]) -> tuple[Step, ...]:
    new = len(after) - len(before)
    padded = (sympy.Integer(1),) * new + before
    repeated = tuple(dim for dim, (old, now) in enumerate(zip(padded, after, strict=True)) if old != now)
    return (Regroup(before), Repeat(repeated))


def _narrowed(before: tuple[Size, ...], dim: int, start) -> tuple[Step, ...] | None:
    dim = dim % len(before)
    start = _position(start, before[dim])
    return None if start is None else (Narrow(dim, start, before[dim]),)


def _selected(before: tuple[Size, ...], dim: int, index) -> tuple[Step, ...] | None:
    dim = dim % len(before)
    index = _position(index, before[dim])
    return None if index is None else (Select(dim, index, before[dim]),)


def _position(index, size: Size) -> Size | None:
    """A start or index as a non-negative expression; ``None`` where its sign is unknown."""
    if not isinstance(index, (int, torch.SymInt)):
        return None
    position = size_of(index)
    if position.is_negative:
        position += size
    return position if position.is_nonnegative else None


def _indexed(before: tuple[Size, ...], after: tuple[Size, ...], index) -> tuple[Step, ...] | None:
    """``x[...]`` with integers, unit-step slices, ``None`` and one ellipsis, or a list of one integer among slices."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is not None and item is not Ellipsis and not _is_basic(item) for item in items):
        return None
    if any(map(_is_list, items)) and sum(_is_list(item) or _is_integer(item) for item in items) > 1:
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        consumed = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (len(before) - consumed)
    steps: list[Step] = []
    shape, dim = list(before), 0  # dimensions before `dim` already have their final form
    for item in items:
        if item is None:
            steps.append(Regroup(tuple(shape)))
            shape.insert(dim, sympy.Integer(1))
        elif item == slice(None):
            pass
        elif isinstance(item, slice) or _is_list(item):
            start = item.start or 0 if isinstance(item, slice) else item[0]
            narrowed = _narrowed(tuple(shape), dim, start)
            if narrowed is None:
                return None
            steps += narrowed
            shape[dim] = after[dim]
        else:
            selected = _selected(tuple(shape), dim, item)
            if selected is None:
                return None
            steps += selected
            del shape[dim]
            continue
        dim += 1
    return tuple(steps)


def _is_basic(item: object) -> bool:
    if isinstance(item, slice):
        return item.step in (None, 1)
    return _is_integer(item) or _is_list(item)


def _is_integer(item: object) -> bool:
    return isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool)


def _is_list(item: object) -> bool:
    return isinstance(item, list) and len(item) == 1 and _is_integer(item[0])


def _member_of_tuple(node: Node, call: Call) -> View | None:
    """``getitem`` of what ``split``, ``chunk`` or ``unbind`` returned."""
    parts_node, index = call.input, call["index"]
    parts, source = value_of(parts_node), read(parts_node)
    if source is None or source.op not in ("split", "chunk", "unbind"):
        return None
    if not isinstance(parts, (tuple, list)) or not isinstance(index, int):
        return None
    before = shape_of(source.input)
    if before is None:
        return None
    dim = source.get("dim", 0) % len(before)
    nodes = (node, parts_node)
    if source.op == "unbind":
        return View(source.input, (Select(dim, sympy.Integer(index % len(parts)), before[dim]),), nodes)
    start = sympy.Add(*(size_of(part.shape[dim]) for part in parts[: index % len(parts)]))
    return View(source.input, (Narrow(dim, start, before[dim]),), nodes)
