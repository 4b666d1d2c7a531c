"""Kernels of a rewritten graph's operators begin to compile before Inductor does.

Triton compiles a kernel where it is launched first, one after the other. So while Inductor compiles the rest, the
operators' implementations are called on tensors without contents, of the metadata that the example values have.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..kernels.ahead import compile_ahead
from ..ops.registry import on_gpu
from .values import tensor_of


class _Like(NamedTuple):
    """A tensor's metadata."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stand_in(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


Call = tuple[Callable, tuple]
"""An operator's implementation and its arguments by position, tensors by their metadata."""


def compile_kernels_of(graph: Graph) -> None:
    """Begin to compile what the operators of a graph launch on GPUs. Calls of dynamic sizes are left to themselves."""
    calls: dict[torch.device, set[Call]] = {}
    for node in graph.nodes:
        x = tensor_of(node.kwargs.get("x")) if node.target in on_gpu else None
        if x is None or x.device.type != "cuda":
            continue
        arguments = _arguments(node)
        if all(map(_is_static, arguments)):
            calls.setdefault(x.device, set()).add((on_gpu[node.target], arguments))
    for device, alike in calls.items():
        compile_ahead(partial(_rehearse, alike), device)


def _arguments(node: Node) -> tuple:
    """All arguments in the order of the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = [node.kwargs.get(each.name, each.default_value) for each in node.target._schema.arguments]
    values = map(tensor_of, given)
    return tuple(
        argument if value is None else _Like(tuple(value.shape), value.stride(), value.dtype)
        for argument, value in zip(given, values, strict=True)
    )


def _is_static(argument: Any) -> bool:
    """Whether it is a number, a name or nothing, or a tensor of known sizes."""
    if isinstance(argument, _Like):
        return all(type(size) is int for size in (*argument.shape, *argument.strides))
    return not isinstance(argument, Node)


def _rehearse(calls: Iterable[Call]) -> None:
    for implementation, arguments in calls:
        implementation(*(each.stand_in() if isinstance(each, _Like) else each for each in arguments))
