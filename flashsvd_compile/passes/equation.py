"""The equation of an ``einsum`` of two tensors, letter by letter."""

from typing import NamedTuple

from torch.fx import Node

from .values import shape_of
from .vocabulary import Call


class Equation(NamedTuple):
    """``left,right->result``, of tensors ``operands``; no letter twice in one of them."""

    left: str
    right: str
    result: str
    operands: tuple[Node, Node]


def read_equation(call: Call) -> Equation | None:
    """``None`` for other than two tensors, an ellipsis, a diagonal, or where a dimension of size 1 is repeated."""
    equation, operands = call["equation"], call["operands"]
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if not arrow or any(len(set(letters)) != len(letters) for letters in (left, right, result)):
        return None
    of_left, of_right = (
        dict(zip(x, shape_of(o) or (), strict=False)) for x, o in zip((left, right), operands, strict=True)
    )
    if any(size != of_right.get(letter, size) for letter, size in of_left.items()):
        return None
    return Equation(left, right, result, operands)
