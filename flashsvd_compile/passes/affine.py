"""Reads an affine map of the last dimension, ``y = x @ weight.T + bias``, in any spelling."""

from typing import NamedTuple

import torch
from torch.fx import Node

from .equation import Equation, read_equation
from .values import number_of, shape_of, tensor_of
from .vocabulary import read
from .weights import Weight, is_weight


class Affine(NamedTuple):
    """``y = x @ weight.T + bias`` over the last dimension.

    Attributes:
        source: node of x.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or ``None``.
        nodes: nodes that compute y, in order of execution; the last is y.
    """

    source: Node
    weight: Weight
    bias: Weight | None
    nodes: tuple[Node, ...]


_MAX_STEPS = 32
"""Operations that one map is read out of."""


def read_affine(node: Node, diagonal: bool = False, steps: int = 0) -> Affine | None:
    """``node`` as one affine map of the last dimension.

    Args:
        node: the result.
        diagonal: also fold a multiplication of the features by a vector or a number, as found between two factors.
        steps: operations read already.
    """
    call = read(node)
    if call is None or tensor_of(node) is None or steps > _MAX_STEPS:
        return None
    if call.op == "linear":
        bias = call.get("bias")
        return _affine(call.input, Weight.of(call["weight"]), bias, node)
    if call.op == "matmul" and is_weight(call["other"], 2):
        return _affine(call.input, Weight.of(call["other"]).transposed, None, node)
    if call.op == "addmm" and is_weight(call["mat2"], 2) and is_weight(call.input, 1):
        if number_of(call.get("beta", 1)) == 1 and number_of(call.get("alpha", 1)) == 1:
            return _affine(call["mat1"], Weight.of(call["mat2"]).transposed, call.input, node)
        return None
    if call.op == "einsum":
        return _einsum(read_equation(call), node)
    if call.op == "add" and number_of(call.get("alpha", 1)) == 1:
        return _biased(call.input, call["other"], node, steps) or _biased(call["other"], call.input, node, steps)
    if diagonal and call.op == "mul":
        return _scaled(call.input, call["other"], node, steps) or _scaled(call["other"], call.input, node, steps)
    if diagonal and call.op == "dropout":
        inner = read_affine(call.input, True, steps + 1)
        return None if inner is None else inner._replace(nodes=(*inner.nodes, node))
    return None


def _affine(source: object, weight: Weight, bias: Node | None, node: Node) -> Affine | None:
    value = tensor_of(source)
    if not isinstance(source, Node) or value is None or value.dim() < 2:
        return None
    if len(weight.shape) != 2 or not all(isinstance(size, int) for size in weight.shape):
        return None
    if bias is not None and shape_of(bias) != (weight.shape[0],):
        return None  # one number for all features
    return Affine(source, weight, None if bias is None else Weight.of(bias), (node,))


def _einsum(equation: Equation | None, node: Node) -> Affine | None:
    """``'bld,dr->blr'`` and the like: one weight, the last axis of the source contracted."""
    if equation is None or not is_weight(equation.operands[1], 2) or len(equation.left) < 2:
        return None
    source, weight, result, operands = equation
    contracted, rows = source[-1], source[:-1]
    kept = weight.replace(contracted, "")
    if len(kept) != 1 or kept in source or result != rows + kept:
        return None
    value = Weight.of(operands[1])
    return _affine(operands[0], value.transposed if weight[0] == contracted else value, None, node)


def _biased(affine: object, bias: object, node: Node, steps: int) -> Affine | None:
    """An affine map plus a vector over the features."""
    if not is_weight(bias, 1) or not isinstance(affine, Node) or not isinstance(bias, Node):
        return None
    inner = read_affine(affine, steps=steps + 1)
    if inner is None or shape_of(affine) != shape_of(node) or shape_of(bias) != (inner.weight.shape[0],):
        return None
    if len(affine.users) > 1:
        return None  # the value without bias is wanted too
    added = Weight.of(bias)
    total = added if inner.bias is None else Weight.call("add", inner.bias, added)
    return inner._replace(bias=total, nodes=(*inner.nodes, node))


def _scaled(affine: object, factor: object, node: Node, steps: int) -> Affine | None:
    """An affine map times a vector over the features, or times a number."""
    if not isinstance(affine, Node) or shape_of(affine) != shape_of(node) or len(affine.users) > 1:
        return None
    inner = read_affine(affine, True, steps + 1)
    if inner is None or inner.weight.value.dtype == torch.float16:
        return None  # a product with it may be too small or too large for float16
    number = number_of(factor)
    if number is not None:
        scale, column = number, number
    elif isinstance(factor, Node) and is_weight(factor, 1) and shape_of(factor) == inner.weight.shape[:1]:
        scale = Weight.of(factor)
        column = Weight.call("unsqueeze", scale, 1)
    else:
        return None
    bias = None if inner.bias is None else Weight.call("mul", inner.bias, scale)
    return inner._replace(weight=Weight.call("mul", inner.weight, column), bias=bias, nodes=(*inner.nodes, node))


def read_scaling(node: Node) -> tuple[Node, float] | None:
    """``x`` and the factor of ``x * number``, ``number * x`` or ``x / number``."""
    call = read(node)
    if call is None or call.op not in ("mul", "div"):
        return None
    pairs = [(call.input, call["other"])] + ([(call["other"], call.input)] if call.op == "mul" else [])
    for tensor, factor in pairs:
        number = number_of(factor)
        if number is not None and tensor_of(tensor) is not None and (number or call.op == "mul"):
            return tensor, number if call.op == "mul" else 1 / number
    return None
