"""What each operation does to symbolic values: one rule an operation.

A rule gives the value of a node, or ``None`` where the algebra has no name for it.
"""

import operator
from collections.abc import Callable
from math import inf
from typing import Protocol

import sympy
import torch
from torch.fx import Node

from .index_values import (
    FALSE,
    TRUE,
    AtLeastZero,
    Choice,
    Entry,
    InOrder,
    Predicate,
    SameEntry,
    Value,
    along,
    at,
    at_least_zero,
    axis,
    negation,
    replaced,
    shifted,
)
from .values import number_of, shape_of, tensor_of
from .vocabulary import CASTS, Call


class Reader(Protocol):
    """Gives the values of a node's operands."""

    def read(self, node: Node) -> Value:
        """The element of ``node`` at its own position."""
        ...

    def read_operand(self, operand: object, result: Node) -> Value | None:
        """The element of a number or tensor that is broadcast to ``result``."""
        ...


Rule = Callable[[Reader, Node, Call], Value | None]


def _constant(number: float | None, dtype: torch.dtype) -> Value | None:
    if number is None:
        return None
    if dtype is torch.bool:
        return TRUE if number else FALSE
    if dtype.is_floating_point:
        return Choice.constant(_rounded(number, dtype))
    return sympy.Integer(int(number))


def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=torch.float64).to(dtype).item()


def _dtype(node: object) -> torch.dtype | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def _as_predicate(value: Value | None, operand: object) -> Predicate | None:
    if isinstance(value, Predicate):
        return value
    if isinstance(value, Entry) and _dtype(operand) is torch.bool:
        return Predicate.of(value)
    return None


def _as_choice(value: Value | None) -> Choice | None:
    if isinstance(value, sympy.Integer):
        return Choice.constant(float(value))
    return value if isinstance(value, Choice) else None


def _arange(algebra: Reader, node: Node, call: Call) -> Value | None:
    if _dtype(node) not in (torch.int32, torch.int64):
        return None
    bounds = [algebra.read_operand(bound, node) for bound in call["range"]]
    begins = len(bounds) > 1 or "end" in call.arguments  # arange(2, end=10)
    start = bounds[0] if bounds and begins else algebra.read_operand(call.get("start", 0), node)
    step = bounds[2] if len(bounds) > 2 else algebra.read_operand(call.get("step", 1), node)
    (size,) = shape_of(node) or (None,)
    if not isinstance(start, sympy.Expr) or not isinstance(step, sympy.Expr) or size is None:
        return None
    return start + step * along(0, size)


def _filled(number: float | None) -> Rule:
    def rule(algebra: Reader, node: Node, call: Call) -> Value | None:
        dtype = _dtype(node)
        filling = number_of(call.get("fill_value", call.get("data"))) if number is None else number
        return None if dtype is None else _constant(filling, dtype)

    return rule


def _arithmetic(function: Callable) -> Rule:
    """Of integers as expressions, of floating numbers one by one."""

    def rule(algebra: Reader, node: Node, call: Call) -> Value | None:
        if call.get("alpha", 1) != 1:
            return None
        values = [algebra.read_operand(call[name], node) for name in ("input", "other") if name in call.arguments]
        dtype = _dtype(node)
        if dtype in (torch.int32, torch.int64) and all(isinstance(value, sympy.Expr) for value in values):
            return function(*values)
        if isinstance(values[0], Entry) and len(values) == 2:
            return _shifted_entry(function, values[0], values[1], node)
        choices = [choice for choice in map(_as_choice, values) if choice is not None]
        if dtype is None or not dtype.is_floating_point or len(choices) < len(values):
            return None
        return _levelwise(function, choices, dtype)

    return rule


def _shifted_entry(function: Callable, entry: Entry, other: Value | None, node: Node) -> Entry | None:
    """``entry + number`` or ``entry - number``."""
    integral = _dtype(node) in (torch.int32, torch.int64) and _dtype(entry.node) is _dtype(node)
    if not integral or not isinstance(other, sympy.Integer):
        return None
    x = sympy.Dummy()
    difference = function(x, other) - x
    return shifted(entry, int(difference)) if isinstance(difference, sympy.Integer) else None


def _levelwise(function: Callable, choices: list[Choice], dtype: torch.dtype) -> Value | None:
    """Apply ``function`` to both levels of one choice; the other operand is constant."""
    varying = [choice for choice in choices if not choice.is_constant]
    if len(varying) > 1:
        return None
    condition = varying[0].condition if varying else TRUE
    yes, no = function(*(choice.yes for choice in choices)), function(*(choice.no for choice in choices))
    return Choice(condition, _rounded(yes, dtype), _rounded(no, dtype))


def _sum(algebra: Reader, node: Node, call: Call) -> Value | None:
    """``a + b``; of two masks that are 0 or -inf, 0 where both are."""
    values = [algebra.read_operand(call[name], node) for name in ("input", "other")]
    masks = [value for value in values if isinstance(value, Choice) and {value.yes, value.no} == {0, -inf}]
    first, second = [mask.where_zero for mask in masks] if len(masks) == 2 else (None, None)
    if first is not None and second is not None and call.get("alpha", 1) == 1:
        return Choice(first & second, 0.0, -inf)
    return _plain_sum(algebra, node, call)


_plain_sum = _arithmetic(operator.add)


_COMPARISONS: dict[str, Callable] = {
    "lt": lambda a, b: at_least_zero(b - a - 1),
    "le": lambda a, b: at_least_zero(b - a),
    "gt": lambda a, b: at_least_zero(a - b - 1),
    "ge": lambda a, b: at_least_zero(a - b),
    "eq": lambda a, b: Predicate.of(AtLeastZero(a - b), AtLeastZero(b - a)),
    "ne": lambda a, b: _known(sympy.expand(a - b).is_zero),  # a disjunction where it is not known
}


def _known(equal: bool | None) -> Predicate | None:
    return None if equal is None else FALSE if equal else TRUE


def _comparison(algebra: Reader, node: Node, call: Call) -> Value | None:
    left, right = (algebra.read_operand(call[name], node) for name in ("input", "other"))
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _COMPARISONS[call.op](left, right)
    if isinstance(left, Entry) and isinstance(right, Entry) and left.node is right.node:
        return _comparison_of_entries(call.op, left, right)
    chosen, level = _as_choice(left), _as_choice(right)
    if chosen is None or level is None or not level.is_constant:
        return None
    holds = [bool(getattr(torch, call.op)(torch.tensor(value), level.yes)) for value in (chosen.yes, chosen.no)]
    return _where_levels(chosen.condition, *holds)


def _comparison_of_entries(op: str, left: Entry, right: Entry) -> Predicate | None:
    """Two elements of one tensor: the same, or of integers in order."""
    if op == "eq" and left.plus == right.plus:
        return Predicate.of(SameEntry(left, right))
    if _dtype(left.node) not in (torch.int32, torch.int64):
        return None
    orders = {
        "le": InOrder(left, right),
        "lt": InOrder(shifted(left, 1), right),
        "ge": InOrder(right, left),
        "gt": InOrder(shifted(right, 1), left),
    }
    return Predicate.of(orders[op]) if op in orders else None


def _where_levels(condition: Predicate, yes: bool, no: bool) -> Predicate | None:
    if yes == no:
        return TRUE if yes else FALSE
    return condition if yes else negation(condition)


def _conjunction(algebra: Reader, node: Node, call: Call) -> Value | None:
    left, right = (_as_predicate(algebra.read_operand(call[name], node), call[name]) for name in ("input", "other"))
    return None if left is None or right is None else left & right


def _opposite(algebra: Reader, node: Node, call: Call) -> Value | None:
    predicate = _as_predicate(algebra.read_operand(call.input, node), call.input)
    return None if predicate is None else negation(predicate)


def _conversion(algebra: Reader, node: Node, call: Call) -> Value | None:
    value, dtype = algebra.read_operand(call.input, node), _dtype(node)
    predicate = _as_predicate(value, call.input)
    if dtype is None or value is None or (isinstance(value, Entry) and predicate is None):
        return None
    if dtype is torch.bool:
        choice = _as_choice(value)
        return predicate if choice is None else _where_levels(choice.condition, choice.yes != 0, choice.no != 0)
    if predicate is not None:
        return Choice(predicate, 1.0, 0.0)
    if isinstance(value, Choice) and dtype.is_floating_point:
        return Choice(value.condition, _rounded(value.yes, dtype), _rounded(value.no, dtype))
    if isinstance(value, sympy.Expr) and dtype in (torch.int32, torch.int64):
        return value
    return None


def _unchanged(algebra: Reader, node: Node, call: Call) -> Value | None:
    return algebra.read_operand(call.input, node)


def _where(algebra: Reader, node: Node, call: Call) -> Value | None:
    condition = _as_predicate(algebra.read_operand(call["condition"], node), call["condition"])
    yes, no = (_as_choice(algebra.read_operand(call.get(name), node)) for name in ("input", "other"))
    return _selected(condition, yes, no)


def _masked_fill(algebra: Reader, node: Node, call: Call) -> Value | None:
    condition = _as_predicate(algebra.read_operand(call["mask"], node), call["mask"])
    value = _as_choice(algebra.read_operand(call["value"], node))
    return _selected(condition, value, _as_choice(algebra.read_operand(call.input, node)))


def _selected(condition: Predicate | None, yes: Choice | None, no: Choice | None) -> Choice | None:
    """``yes where condition else no`` as long as it has two values."""
    if condition is None or yes is None or no is None or not yes.is_constant:
        return None
    if no.is_constant:
        return Choice(condition, yes.yes, no.yes)
    elsewhere = negation(condition)
    kept = no.condition if no.no == yes.yes else negation(no.condition)
    if elsewhere is None or kept is None or yes.yes not in (no.yes, no.no):
        return None
    return Choice(kept & elsewhere, no.yes if no.no == yes.yes else no.no, yes.yes)


def _triangle(sign: int) -> Rule:
    """``tril`` keeps positions with ``column - row <= diagonal`` (sign 1), ``triu`` those with ``>=`` (sign -1)."""

    def rule(algebra: Reader, node: Node, call: Call) -> Value | None:
        diagonal = algebra.read_operand(call.get("diagonal", 0), node)
        if not isinstance(diagonal, sympy.Expr):
            return None
        *_, rows, columns = shape_of(node) or (sympy.Integer(1),) * 2
        kept = at_least_zero(sign * (along(1, rows) + diagonal - along(0, columns)))
        value = algebra.read_operand(call.input, node)
        predicate, choice = _as_predicate(value, call.input), _as_choice(value)
        if kept is None:
            return None
        if predicate is not None:
            return predicate & kept
        if choice is None:
            return None
        if choice.is_constant:
            return Choice(kept, choice.yes, 0.0)
        zero = choice.where_zero
        other = None if zero is None else negation(zero)
        return None if other is None else Choice(other & kept, choice.yes or choice.no, 0.0)

    return rule


def _gather(algebra: Reader, node: Node, call: Call) -> Value | None:
    """``x[index0, index1, ...]`` with one index tensor for each dimension of ``x``."""
    indices, source = call.get("index", call.get("indices")), call.input
    shape = shape_of(source)
    if not isinstance(indices, (tuple, list)) or shape is None or len(indices) != len(shape):
        return None
    positions = [algebra.read_operand(index, node) if tensor_of(index) is not None else None for index in indices]
    if not all(isinstance(position, sympy.Expr) and position.is_nonnegative for position in positions):
        return None
    return at(algebra.read(source), positions)  # pyright: ignore[reportArgumentType]


def _differences(algebra: Reader, node: Node, call: Call) -> Value | None:
    """``diff`` along the last dimension of numbers that go on in front as they do behind."""
    numbers = algebra.read(call.input)
    if not isinstance(numbers, sympy.Expr) or call.get("n", 1) != 1 or call.get("append") is not None:
        return None
    if call.get("dim", -1) not in (-1, len(shape_of(node) or ()) - 1):
        return None
    before = replaced(numbers, {axis(0): axis(0) - 1})
    prepend = call.get("prepend")
    if not isinstance(prepend, Node):
        return replaced(numbers, {axis(0): axis(0) + 1}) - numbers
    continues = sympy.expand(replaced(before, {axis(0): sympy.Integer(0)}) - algebra.read(prepend)) == 0
    return sympy.expand(numbers - before) if continues and (shape_of(prepend) or ())[-1:] == (1,) else None


def _running_count(algebra: Reader, node: Node, call: Call) -> Value | None:
    """``cumsum`` of nothing but zeros."""
    return sympy.Integer(0) if algebra.read(call.input) in (FALSE, sympy.Integer(0)) else None


RULES: dict[str, Rule] = {
    "arange": _arange,
    "zeros": _filled(0),
    "new_zeros": _filled(0),
    "zeros_like": _filled(0),
    "ones": _filled(1),
    "new_ones": _filled(1),
    "ones_like": _filled(1),
    "full": _filled(None),
    "new_full": _filled(None),
    "full_like": _filled(None),
    "tensor": _filled(None),
    "add": _sum,
    "sub": _arithmetic(operator.sub),
    "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(operator.mul),
    "neg": _arithmetic(operator.neg),
    "abs": _arithmetic(abs),
    **dict.fromkeys(_COMPARISONS, _comparison),
    "logical_and": _conjunction,
    "logical_not": _opposite,
    **dict.fromkeys((*CASTS, "bool", "int", "long"), _conversion),
    "detach": _unchanged,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "diff": _differences,
    "cumsum": _running_count,
    "getitem": _gather,
    "index": _gather,
}
