"""Axes of a tensor's dimensions, and how they fall apart and together when a tensor takes another shape."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import sympy

Size = sympy.Expr


class Axis(NamedTuple):
    """One indivisible run of positions; a dimension is a product of axes, outermost first."""

    name: str
    size: Size


class Window(NamedTuple):
    """A range out of a larger dimension: positions ``start .. start + product(inner)`` of ``size``."""

    inner: tuple["Axis | Window", ...]
    start: Size
    size: Size


Dim = tuple[Axis | Window, ...]
Layout = tuple[Dim, ...]


def extent(dim: Dim) -> Size:
    """Number of positions of a dimension."""
    return sympy.Mul(*(axis.size for axis in dim))


def regroup(axes: list[Axis | Window], shape: Sequence[Size]) -> Layout | None:
    """Distribute axes over dimensions of given sizes, splitting an axis where a dimension ends inside it."""
    if sympy.Integer(0) in shape:
        return None
    rest, layout = list(axes), []
    for size in shape:
        dim: list[Axis | Window] = []
        missing = size
        while missing != 1:
            if not rest:
                return None
            axis = rest.pop(0)
            if not _divides(axis.size, missing):
                axis, remainder = _split(axis, missing)
                if axis is None or remainder is None:
                    return None
                rest.insert(0, remainder)
            dim.append(axis)
            missing = ratio(missing, axis.size)
        layout.append(tuple(dim))
    return tuple(layout) if not rest else None


def _divides(part: Size, whole: Size) -> bool:
    """Whether ``whole / part`` is an integer whatever the symbols' values."""
    return ratio(whole, part).as_numer_denom()[1] == 1


@lru_cache(maxsize=4096)
def ratio(whole: Size, part: Size) -> Size:
    return sympy.cancel(whole / part)


def _split(axis: Axis | Window, size: Size) -> tuple[Axis | None, Axis | None]:
    """Cut an axis into an outer one of ``size`` and the inner rest."""
    if isinstance(axis, Window) or not _divides(size, axis.size):
        return None, None
    return Axis(f"{axis.name}.outer", size), Axis(f"{axis.name}.inner", ratio(axis.size, size))


def visible(dim: Dim) -> tuple[Axis, ...]:
    """The axes of a dimension with windows opened."""
    return tuple(inner for axis in dim for inner in (visible(axis.inner) if isinstance(axis, Window) else (axis,)))


def in_order(dims: Sequence[Dim], original: Sequence[Dim]) -> bool:
    """Whether the axes of ``dims``, some of them split, are those of ``original`` in the same order."""
    axes, names = [axis for dim in dims for axis in dim], [axis.name for dim in original for axis in visible(dim)]
    if any(isinstance(axis, Window) for axis in axes):
        return False
    paths = [axis.name.split(".") for axis in visible(tuple(axes))]
    positions = [(names.index(root), *(part == "inner" for part in parts)) for root, *parts in paths]
    return positions == sorted(positions) and extent(tuple(axes)) == sympy.Mul(*map(extent, original))


def named(layout: Layout, *names: str) -> tuple[Axis, ...]:
    """The axes of one of the names; none where the size is 1."""
    return tuple(axis for dim in layout for axis in visible(dim) if axis.name in names)
