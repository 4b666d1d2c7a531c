"""Graphs of plain functions, as Dynamo hands them to a backend or as ``torch.export`` makes them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


class Captured(NamedTuple):
    """A graph and the arguments it was made with."""

    module: GraphModule
    inputs: tuple

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The nodes that the function returned."""
        return tuple(self.module.graph.output_node().args[0])  # pyright: ignore[reportArgumentType, reportReturnType]

    @property
    def output(self) -> Node:
        """The last of them."""
        return self.outputs[-1]

    def argument(self, wanted: Callable[[Tensor], bool]) -> tuple[Node, Tensor]:
        """The first placeholder with a tensor as wanted."""
        pairs = zip(self.module.graph.find_nodes(op="placeholder"), self.inputs, strict=True)
        return next((node, value) for node, value in pairs if isinstance(value, Tensor) and wanted(value))

    def run(self, node: Node | None = None) -> Tensor:
        """The value of a node, the function's result by default."""
        graph = self.module.graph
        graph.output_node().args = ((node or self.output,),)
        self.module.recompile()
        return self.module(*self.inputs)[0]


def dynamo(function: Callable, *arguments: Tensor, dynamic: bool = False) -> Captured:
    """The graph that a ``torch.compile`` backend sees."""
    captured: list[Captured] = []

    def backend(module: GraphModule, _: list) -> Callable:
        def call(*inputs):
            captured.append(Captured(module, inputs))
            return module(*inputs)

        return call

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*arguments)
    (only,) = captured
    return only


def exported(function: Callable, *arguments: Tensor) -> Captured:
    """The ATen graph of ``torch.export``."""

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    program = torch.export.export(Module(), arguments)
    return Captured(program.graph_module, arguments)  # pyright: ignore[reportArgumentType]
