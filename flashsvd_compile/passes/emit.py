"""Adds a node to a graph together with its example value, so that later passes can read it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .values import value_of


def emit(graph: Graph, target: str | Callable[..., Any], *arguments: Any) -> Node:
    """A method (by name) or function call at the graph's insertion point."""
    values = map_arg(arguments, value_of)
    with torch.no_grad():
        if isinstance(target, str):
            node = graph.call_method(target, arguments)
            node.meta["example_value"] = getattr(values[0], target)(*values[1:])
        else:
            node = graph.call_function(target, arguments)
            node.meta["example_value"] = target(*values)
    return node
