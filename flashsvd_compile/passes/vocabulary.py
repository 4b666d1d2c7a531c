"""Many spellings, one reading: what a node computes, whatever it is called in the graph.

Dynamo's graphs hold functions (``torch.add``, ``operator.add``), methods (``"add"``) and their in-place twins; exported
graphs hold ATen overloads (``aten.add.Tensor``). :func:`read` reduces all of them to one operation name and one set of
argument names, so that the rules never look at a target themselves.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.nn import functional

from .values import number_of

# Argument names in positional order; a name with a star collects the rest (sizes given one by one or as a tuple).
_SIGNATURES = {
    "linear": "input weight bias",
    "matmul": "input other",
    "bmm": "input other",
    "baddbmm": "input batch1 batch2 beta alpha",
    "addmm": "input mat1 mat2 beta alpha",
    "einsum": "equation *operands",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
    "softmax": "input dim _stacklevel dtype",
    "dropout": "input p training inplace",
    "add": "input other alpha",
    "sub": "input other alpha",
    "rsub": "input other alpha",
    "mul": "input other",
    "div": "input other",
    "pow": "input exponent",
    "square": "input",
    "neg": "input",
    "tanh": "input",
    "sigmoid": "input",
    "erf": "input",
    "exp": "input",
    "abs": "input",
    "sqrt": "input",
    "rsqrt": "input",
    "reciprocal": "input",
    "clamp": "input min max",
    "clamp_min": "input min",
    "relu": "input inplace",
    "relu6": "input inplace",
    "gelu": "input approximate",
    "silu": "input inplace",
    "elu": "input alpha inplace",
    "leaky_relu": "input negative_slope inplace",
    "softplus": "input beta threshold",
    "mish": "input inplace",
    "hardswish": "input inplace",
    "maximum": "input other",
    "max": "input other keepdim",
    "mean": "input dim keepdim dtype",
    "sum": "input dim keepdim dtype",
    "var": "input dim unbiased keepdim",
    "layer_norm": "input normalized_shape weight bias eps cudnn_enable",
    "rms_norm": "input normalized_shape weight eps",
    "view": "input *shape",
    "reshape": "input *shape",
    "_unsafe_view": "input *shape",
    "reshape_as": "input other",
    "view_as": "input other",
    "expand_as": "input other",
    "flatten": "input start_dim end_dim",
    "unflatten": "input dim sizes",
    "squeeze": "input dim",
    "unsqueeze": "input dim",
    "contiguous": "input",
    "clone": "input",
    "alias": "input",
    "to": "input *conversion",
    "type_as": "input other",
    "float": "input",
    "half": "input",
    "bfloat16": "input",
    "transpose": "input dim0 dim1",
    "permute": "input *dims",
    "movedim": "input source destination",
    "t": "input",
    "mT": "input",
    "getattr": "input name",
    "getitem": "input index",
    "narrow": "input dim start length",
    "select": "input dim index",
    "slice": "input dim start end step",
    "split": "input sizes dim",
    "chunk": "input chunks dim",
    "unbind": "input dim",
    "expand": "input *sizes",
    "repeat_interleave": "input repeats dim",
    "cat": "tensors dim",
    "masked_fill": "input mask value",
    "size": "input dim",
    "block_diag": "*tensors",
    "stack": "tensors dim",
    "index": "input indices",
    "arange": "*range",
    "zeros": "*sizes",
    "ones": "*sizes",
    "full": "sizes fill_value",
    "new_zeros": "input *sizes",
    "new_ones": "input *sizes",
    "new_full": "input sizes fill_value",
    "zeros_like": "input",
    "ones_like": "input",
    "full_like": "input fill_value",
    "tensor": "data",
    "where": "condition input other",
    "tril": "input diagonal",
    "triu": "input diagonal",
    "lt": "input other",
    "le": "input other",
    "gt": "input other",
    "ge": "input other",
    "eq": "input other",
    "ne": "input other",
    "logical_and": "input other",
    "logical_not": "input",
    "bool": "input",
    "int": "input",
    "long": "input",
    "detach": "input",
    "cumsum": "input dim dtype",
    "diff": "input n dim prepend append",
}

_ARGUMENT_NAMES = {op: signature.split() for op, signature in _SIGNATURES.items()}

_ALIASES = {
    "mm": "matmul",
    "__matmul__": "matmul",
    "iadd": "add",
    "__add__": "add",
    "__radd__": "add",
    "isub": "sub",
    "imul": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "multiply": "mul",
    "truediv": "div",
    "itruediv": "div",
    "divide": "div",
    "true_divide": "div",
    "__truediv__": "div",
    "ipow": "pow",
    "__pow__": "pow",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "broadcast_to": "expand",
    "concat": "cat",
    "concatenate": "cat",
    "ravel": "flatten",
    "numpy_T": "t",
    "_to_copy": "to",
    "type": "to",
    "_softmax": "softmax",
    "split_with_sizes": "split",
    "clip": "clamp",
    "masked_fill_": "masked_fill",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt",
    "__ge__": "ge",
    "__eq__": "eq",
    "__ne__": "ne",
    "and_": "logical_and",
    "__and__": "logical_and",
    "bitwise_and": "logical_and",
    "invert": "logical_not",
    "__invert__": "logical_not",
    "bitwise_not": "logical_not",
    "scalar_tensor": "tensor",
}

_ARGUMENT_ALIASES = {
    "self": "input",
    "x": "input",
    "mat2": "other",
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "split_size_or_sections": "sizes",
    "split_size": "sizes",
    "split_sizes": "sizes",
    "size": "sizes",
}

_ATTRIBUTES = {"T": "t", "mT": "mT"}
"""Attributes of a tensor that are operations; in graphs of Dynamo since torch 2.14 they are ATen's operators."""

CASTS = frozenset({"to", "float", "half", "bfloat16", "type_as"})
"""Operations to another floating dtype, or device."""


class Call(NamedTuple):
    """One operation with its arguments by name."""

    op: str
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def input(self) -> Any:
        return self.arguments.get("input")


def read(node: object) -> Call | None:
    """What ``node`` computes, or ``None`` when the vocabulary has no word for it."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    op = _operation(node)
    if op is None:
        return None
    arguments = _bind(_ARGUMENT_NAMES[op], node)
    if op == "getattr" and arguments is not None and arguments.get("name") in _ATTRIBUTES:
        return Call(_ATTRIBUTES[arguments["name"]], {"input": arguments["input"]})
    return None if arguments is None else Call(op, arguments)


def is_call(node: object, *ops: str) -> bool:
    """Whether ``node`` is one of the named operations."""
    call = read(node)
    return call is not None and call.op in ops


def _operation(node: Node) -> str | None:
    if isinstance(node.target, str):
        return _canonical(node.target)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(node.target).partition(".")
        return _canonical(name.split(".")[0]) if namespace == "aten" else None
    return _FUNCTIONS.get(node.target)


def _canonical(name: str) -> str | None:
    for spelling in (name, name.removesuffix("_")):
        spelling = _ALIASES.get(spelling, spelling)
        if spelling in _SIGNATURES:
            return spelling
    return None


def _bind(names: list[str], node: Node) -> dict[str, Any] | None:
    """Arguments by name; ``None`` for a call that the signature does not cover."""
    arguments: dict[str, Any] = {}
    positional = list(node.args)
    for position, name in enumerate(names):
        if name.startswith("*"):
            rest = tuple(positional[position:])
            if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
                rest = tuple(rest[0])
            arguments[name[1:]] = rest
            positional = positional[:position]
    if len(positional) > len(names):
        return None
    arguments.update(zip(names, positional, strict=False))
    for name, argument in node.kwargs.items():
        arguments[name if name in names else _ARGUMENT_ALIASES.get(name, name)] = argument
    return None if arguments.get("rounding_mode") is not None else arguments  # of a division, to an integer


def _functions() -> dict[Callable, str]:
    """Every function object of torch and ``operator`` that spells an operation of the vocabulary."""
    table: dict[Callable, str] = {getattr: "getattr", operator.getitem: "getitem"}
    for spelling in (*_SIGNATURES, *_ALIASES):
        for home in (operator, torch, functional, torch.special):
            for name in (spelling, f"{spelling}_"):
                function = getattr(home, name, None)
                if callable(function) and not isinstance(function, type):
                    table.setdefault(function, _ALIASES.get(spelling, spelling))
    return table


_FUNCTIONS = _functions()


def live_dropout(node: Node) -> bool:
    """Whether ``node`` is a dropout that is not provably off."""
    call = read(node)
    if call is None or call.op != "dropout":
        return False
    if call.get("training", True) is False:
        return False
    return number_of(call.get("p", 0.5)) != 0.0
