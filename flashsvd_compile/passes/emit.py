"""Adds a node to a graph together with its example value, so that later passes can read it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from .values import EXAMPLE, requires_grad, value_of


def emit(graph: Graph, target: str | Callable[..., Any], *arguments: Any) -> Node:
    """A method (by name) or function call at the graph's insertion point; tracked by autograd if an argument is."""
    if isinstance(target, str):
        node, compute = graph.call_method(target, arguments), lambda x, *rest: getattr(x, target)(*rest)
    else:
        node, compute = graph.call_function(target, arguments), target
    return with_example(node, compute, torch.is_grad_enabled() and any(map(requires_grad, node.all_input_nodes)))


def with_example(node: Node, compute: Callable[..., Any], tracked: bool) -> Node:
    """The node, its example value computed from those of its arguments, and :func:`track`-ed or not."""
    with torch.no_grad():
        node.meta[EXAMPLE] = compute(*map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))
    if tracked:
        track(node)
    return node


def track(node: Node) -> None:
    """Have example tensors say that gradients are wanted of them: rules ask for it, and PyTorch of what a body returns
    (``torch.compiler.nested_compile_region``).
    """
    for tensor in tree_leaves(value_of(node)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.requires_grad:
            with torch.no_grad():
                tensor.requires_grad_()
