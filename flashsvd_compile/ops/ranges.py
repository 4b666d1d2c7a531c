"""Ranges of rows, features, items or heads, some at a time."""


def ranges(total: int, most: int) -> list[slice]:
    """``total`` of something, ``most`` at a time; the last may be fewer."""
    return [slice(first, min(first + most, total)) for first in range(0, total, most)]


def width_of(some: slice) -> int:
    """How many a range has."""
    return some.stop - some.start
