"""Kernels of a rewritten graph's operators begin to compile before Inductor does.

Triton compiles a kernel where it is launched first, one after the other. So while Inductor compiles the rest, the
operators' implementations are called on tensors without contents, of the metadata that the example values have.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..kernels.ahead import compile_ahead
from ..ops.registry import on_gpu
from .values import hint_of, tensor_of, value_of


class _Like(NamedTuple):
    """A tensor's metadata."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stand_in(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


Call = tuple[torch._ops.OpOverload, tuple]
"""An operator and its arguments by position, tensors by their metadata."""


def compile_kernels_of(graph: Graph) -> None:
    """Begin to compile what the operators of a graph launch on GPUs, in the sizes of the call that is traced.

    Operators of sizes that nothing is known of are left to their first launch.
    """
    calls: dict[torch.device, set[Call]] = {}
    for node in graph.nodes:
        x = tensor_of(node.kwargs.get("x")) if node.target in on_gpu else None
        if x is None or x.device.type != "cuda":
            continue
        arguments = tuple(map(_traced, _arguments(node)))
        if _UNKNOWN not in arguments:
            calls.setdefault(x.device, set()).add((node.target, arguments))
    for device, alike in calls.items():
        compile_ahead(partial(_rehearse, alike), device, launches="\n".join(sorted(map(repr, alike))))


def _arguments(node: Node) -> list[Any]:
    """All arguments in the order of the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [node.kwargs.get(each.name, each.default_value) for each in node.target._schema.arguments]


_UNKNOWN = object()


def _traced(argument: Any) -> Any:
    """What stands for an argument: itself, a size's value in the traced call, or a tensor's metadata."""
    if not isinstance(argument, Node):
        return argument
    value = value_of(argument)
    if isinstance(value, (int, torch.SymInt)):
        hint = hint_of(value)
        return _UNKNOWN if hint is None else hint
    if not isinstance(value, torch.Tensor):
        return _UNKNOWN
    shape, strides = _traced_sizes(value.shape), _traced_sizes(value.stride())
    return _UNKNOWN if shape is None or strides is None else _Like(shape, strides, value.dtype)


def _traced_sizes(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...] | None:
    hints = [hint for hint in map(hint_of, sizes) if hint is not None]
    return tuple(hints) if len(hints) == len(sizes) else None


def _rehearse(calls: Iterable[Call]) -> None:
    for operator, arguments in calls:
        on_gpu[operator](*(each.stand_in() if isinstance(each, _Like) else each for each in arguments))
