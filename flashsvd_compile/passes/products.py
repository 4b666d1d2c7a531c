"""Reads products of two activations as what they do to named axes: ``matmul``, ``bmm``, ``baddbmm``, ``einsum``."""

from typing import NamedTuple

from torch.fx import Node

from .equation import Equation, read_equation
from .values import number_of, shape_of
from .vocabulary import read

_MATRICES = {3: ("imc", "icn", "imn"), 4: ("bhmc", "bhcn", "bhmn")}


class Product(NamedTuple):
    """``result[...] = sum(left[...] * right[...])``, every dimension named by a letter.

    Attributes:
        left, right: the factors.
        left_letters, right_letters, letters: of the factors and of the result, one a dimension.
        scale: constant factor on the result.
    """

    left: Node
    right: Node
    left_letters: str
    right_letters: str
    letters: str
    scale: float = 1.0

    @property
    def shared(self) -> str:
        """Letters of both factors and of the result: batch and heads."""
        return "".join(x for x in self.letters if x in self.left_letters and x in self.right_letters)

    @property
    def summed(self) -> str:
        """Letters that are summed over."""
        return "".join(x for x in self.left_letters if x in self.right_letters and x not in self.letters)

    @property
    def of_left(self) -> str:
        """Letters of the left factor only."""
        return "".join(x for x in self.letters if x not in self.right_letters)

    @property
    def of_right(self) -> str:
        """Letters of the right factor only."""
        return "".join(x for x in self.letters if x not in self.left_letters)

    def swapped(self) -> "Product":
        """The same product with its factors exchanged."""
        return Product(self.right, self.left, self.right_letters, self.left_letters, self.letters, self.scale)


def read_product(node: object) -> Product | None:
    """``node`` as a product over one summed axis with one or two shared ones, ``None`` for anything else."""
    call = read(node)
    if call is None:
        return None
    if call.op in ("matmul", "bmm"):
        return _of_matrices(call.input, call["other"], 1.0)
    if call.op == "baddbmm" and number_of(call.get("beta", 1)) == 0:
        scale = number_of(call.get("alpha", 1))
        return None if scale is None else _of_matrices(call["batch1"], call["batch2"], scale)
    if call.op == "einsum":
        return _of_einsum(read_equation(call))
    return None


def read_biased_product(node: object) -> tuple[Product, Node] | None:
    """``node`` as a product plus another tensor, by ``baddbmm`` only: ``(product, addend)``."""
    call = read(node)
    if call is None or call.op != "baddbmm" or number_of(call.get("beta", 1)) != 1:
        return None
    scale = number_of(call.get("alpha", 1))
    product = None if scale is None else _of_matrices(call["batch1"], call["batch2"], scale)
    return None if product is None else (product, call.input)


def _of_matrices(left: Node, right: Node, scale: float) -> Product | None:
    shapes = shape_of(left), shape_of(right)
    if shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]):
        return None
    letters = _MATRICES.get(len(shapes[0]))
    return None if letters is None else Product(left, right, *letters, scale)


def _of_einsum(equation: Equation | None) -> Product | None:
    if equation is None:
        return None
    left, right, result, operands = equation
    product = Product(*operands, left, right, result)
    sizes = (len(product.shared) in (1, 2), *(len(x) == 1 for x in (product.summed, product.of_left, product.of_right)))
    whole = set(result) == set(product.shared + product.of_left + product.of_right)
    return product if all(sizes) and whole else None
