"""What is known of a node's value before the graph runs: example tensors, shapes in the graph's symbols, numbers."""

from typing import Any

import sympy
import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._sympy.symbol import SymT, symbol_is_type

EXAMPLE = "example_value"
"""Key of a node's metadata: the value that Dynamo computed for it."""


def value_of(node: Node) -> Any:
    """The example value that Dynamo (``example_value``) or export (``val``) left on a node."""
    return node.meta.get(EXAMPLE, node.meta.get("val"))


def tensor_of(node: object) -> torch.Tensor | None:
    """The example tensor of a node, ``None`` for anything that is no tensor."""
    value = value_of(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def example(node: Node) -> torch.Tensor:
    """The example tensor of a node that is known to have one."""
    value = tensor_of(node)
    assert value is not None
    return value


def requires_grad(node: Node) -> bool:
    """Whether gradients of a tensor are wanted."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.requires_grad


def shape_of(node: object) -> tuple[sympy.Expr, ...] | None:
    """Shape of a node's tensor as sympy expressions, in the graph's own symbols."""
    tensor = tensor_of(node)
    return None if tensor is None else tuple(map(size_of, tensor.shape))


def example_shape(node: Node) -> tuple[sympy.Expr, ...]:
    """As :func:`shape_of`, of a node that is known to have a tensor."""
    return tuple(map(size_of, example(node).shape))


STORAGE = "storage"
"""Key of a node's metadata: the memory of the tensor that an operator's result replaces, of which there are views."""


def storage_of(node: Node) -> StorageWeakRef | None:
    """The memory behind a node's tensor; of a tensor that ``torch.func`` wraps, behind what is inside."""
    tensor = tensor_of(node)
    while tensor is not None and is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    if tensor is None or tensor.layout != torch.strided:
        return None
    return node.meta.get(STORAGE) or StorageWeakRef(tensor.untyped_storage())


def share_memory(node: Node, other: Node) -> bool:
    """Whether two nodes' tensors are known to be in one memory; of what is no tensor nothing is known."""
    memory, others = storage_of(node), storage_of(other)
    return memory is not None and others is not None and memory == others


def is_same_tensor(node: Node, other: Node) -> bool:
    """Whether two nodes hold the same elements of one memory in the same order."""
    return share_memory(node, other) and _layout(example(node)) == _layout(example(other))


def _layout(tensor: torch.Tensor) -> tuple:
    sizes = tuple(map(size_of, (*tensor.shape, *tensor.stride(), tensor.storage_offset())))
    return tensor.dtype, sizes


def size_of(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression."""
    return sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)


def hints_of(node: Node) -> dict[sympy.Symbol, int]:
    """Values that the symbols of a tensor's shape had when the graph was traced; nothing is guarded on."""
    tensor = tensor_of(node)
    sizes = () if tensor is None else tensor.shape
    return {symbol: value for size in sizes for symbol, value in _hints(size).items()}


def hint_of(size: int | torch.SymInt) -> int | None:
    """Value that a size had when the graph was traced, if that is known; nothing is guarded on."""
    value = sympy.sympify(size_of(size).xreplace(_hints(size)))
    return int(value) if isinstance(value, sympy.Integer) else None


def _hints(size: int | torch.SymInt) -> dict[sympy.Symbol, int]:
    if not isinstance(size, torch.SymInt):
        return {}
    environment = size.node.shape_env
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val  # before torch 2.13
    symbols = [symbol for symbol in size.node.expr.free_symbols if symbol in known]
    return {symbol: int(known[symbol]) for symbol in symbols if sympy.sympify(known[symbol]).is_Integer}


def number_of(argument: object) -> float | None:
    """A Python number, also one that ``dynamic=True`` turned into an ``.item()`` node; not what a size decides.

    Reading a symbolic float guards on its value: a changed attribute then recompiles instead of being ignored.
    """
    if isinstance(argument, Node):
        argument = value_of(argument)
    if isinstance(argument, (torch.SymFloat, torch.SymInt)):
        symbols = argument.node.expr.free_symbols
        return float(argument) if all(symbol_is_type(symbol, SymT.FLOAT) for symbol in symbols) else None
    return float(argument) if isinstance(argument, (int, float)) and not isinstance(argument, bool) else None
