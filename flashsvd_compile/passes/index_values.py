"""Symbolic values of index and mask tensors: what their element at an unknown position is.

An integer is a sympy expression in the position, a boolean a conjunction of conditions on it, a float one of two
numbers. See :mod:`.index_algebra`.
"""

from dataclasses import dataclass, replace
from functools import partial

import sympy
from torch.fx import Node

from .values import shape_of

Position = sympy.Expr
Axes = dict[sympy.Basic, Position]


def axis(dim: int) -> sympy.Symbol:
    """Position along the dimension that is ``dim`` from the last; broadcasting aligns them on the right."""
    return sympy.Symbol(f"axis{dim}", integer=True, nonnegative=True)


def along(dim: int, size: sympy.Expr) -> Position:
    """Position along a dimension of ``size``; the only one of a dimension of size 1 is 0."""
    return sympy.Integer(0) if size == 1 else axis(dim)


@dataclass(frozen=True)
class Entry:
    """An element of a tensor of unknown contents, its negation, or its sum with a number."""

    node: Node
    index: tuple[Position, ...]
    negated: bool = False
    plus: int = 0

    @classmethod
    def of(cls, node: Node) -> "Entry":
        """The element of ``node`` at its own position."""
        shape = shape_of(node) or ()
        return cls(node, tuple(along(len(shape) - 1 - dim, size) for dim, size in enumerate(shape)))

    def at(self, axes: Axes) -> "Entry":
        """The same with its axes replaced."""
        return Entry(self.node, tuple(replaced(position, axes) for position in self.index), self.negated, self.plus)


@dataclass(frozen=True)
class AtLeastZero:
    """The condition ``position >= 0``."""

    position: Position

    def at(self, axes: Axes) -> "AtLeastZero":
        return AtLeastZero(replaced(self.position, axes))


@dataclass(frozen=True)
class SameEntry:
    """The condition that two entries of one tensor are equal."""

    first: Entry
    second: Entry

    def at(self, axes: Axes) -> "SameEntry":
        return SameEntry(self.first.at(axes), self.second.at(axes))


@dataclass(frozen=True)
class InOrder:
    """The condition ``first <= second`` of two integer entries of one tensor."""

    first: Entry
    second: Entry

    def at(self, axes: Axes) -> "InOrder":
        return InOrder(self.first.at(axes), self.second.at(axes))


Clause = Entry | AtLeastZero | SameEntry | InOrder


@dataclass(frozen=True)
class Predicate:
    """A boolean element: true when all clauses are."""

    clauses: frozenset[Clause]

    @classmethod
    def of(cls, *clauses: Clause) -> "Predicate":
        return cls(frozenset(clauses))

    def __and__(self, other: "Predicate") -> "Predicate":
        return Predicate(self.clauses | other.clauses)

    def at(self, axes: Axes) -> "Predicate":
        return Predicate(frozenset(clause.at(axes) for clause in self.clauses))


TRUE = Predicate.of()
FALSE = Predicate.of(AtLeastZero(sympy.Integer(-1)))


@dataclass(frozen=True)
class Choice:
    """A number that takes one of two values."""

    condition: Predicate
    yes: float
    no: float

    @classmethod
    def constant(cls, number: float) -> "Choice":
        return cls(TRUE, number, number)

    @property
    def is_constant(self) -> bool:
        return self.yes == self.no

    @property
    def where_zero(self) -> Predicate | None:
        """Where the number is 0, if one of the two values is."""
        if self.yes == 0:
            return TRUE if self.no == 0 else self.condition
        return negation(self.condition) if self.no == 0 else None

    def at(self, axes: Axes) -> "Choice":
        return Choice(self.condition.at(axes), self.yes, self.no)


Value = Position | Entry | Predicate | Choice


def replaced(position: Position, axes: Axes) -> Position:
    """``position`` with its axes replaced, all at once."""
    return position.xreplace(axes)  # pyright: ignore[reportReturnType]


def at(value: Value, index: list[Position]) -> Value:
    """The value with its own axes replaced: ``index`` has one position for each of them, outermost first."""
    axes: Axes = {axis(len(index) - 1 - dim): position for dim, position in enumerate(index)}
    return replaced(value, axes) if isinstance(value, sympy.Expr) else value.at(axes)


def shifted(entry: Entry, number: int) -> Entry:
    """The sum of an integer entry and a number."""
    return replace(entry, plus=entry.plus + number)


def at_least_zero(position: Position) -> Predicate | None:
    """``position >= 0`` without absolute values: ``w - |u| >= 0`` is ``w - u >= 0`` and ``w + u >= 0``."""
    position = sympy.expand(position)
    for absolute in position.atoms(sympy.Abs):
        if not sympy.sympify(position.coeff(absolute)).is_negative:
            return None
        sides = [at_least_zero(replaced(position, {absolute: sign * absolute.args[0]})) for sign in (1, -1)]
        return None if sides[0] is None or sides[1] is None else sides[0] & sides[1]
    return Predicate.of(AtLeastZero(position))


def negation(predicate: Predicate) -> Predicate | None:
    """The opposite of a single clause; ``None`` for a conjunction, whose opposite is no conjunction."""
    if predicate == TRUE:
        return FALSE
    if len(predicate.clauses) != 1:
        return None
    (clause,) = predicate.clauses
    if isinstance(clause, AtLeastZero):
        return at_least_zero(-clause.position - 1)
    if isinstance(clause, Entry):
        return Predicate.of(Entry(clause.node, clause.index, not clause.negated))
    if isinstance(clause, InOrder):
        return Predicate.of(InOrder(shifted(clause.second, 1), clause.first))
    return None


def minimum(position: Position, sizes: dict[sympy.Symbol, sympy.Expr]) -> Position | None:
    """Least value of an expression linear in the axes over ``0 <= axis < sizes[axis]``, ``None`` if not found."""
    lowest = sympy.expand(position)
    for symbol, size in sizes.items():
        slope = lowest.coeff(symbol)
        if not slope.is_nonnegative and not slope.is_nonpositive:
            return None
        if not all(map(partial(_is_linear, symbol), sympy.Add.make_args(lowest))):
            return None
        lowest = sympy.expand(lowest.xreplace({symbol: sympy.Integer(0) if slope.is_nonnegative else size - 1}))
    return lowest


def _is_linear(symbol: sympy.Symbol, term: sympy.Expr) -> bool:
    """Whether a term of an expanded sum is; a square or an absolute value has no coefficient, or one that varies."""
    slope = sympy.sympify(term.coeff(symbol))
    return symbol not in term.free_symbols or (slope != 0 and symbol not in slope.free_symbols)
