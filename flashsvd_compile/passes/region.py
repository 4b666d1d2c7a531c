"""A region that a rule has read, ready to be checked and replaced."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import takewhile
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ..kernels.target import Target, target_of
from ..ops import norm
from ..ops.projection import argument_names
from ..options import Options, Strategy
from ..planner import Plan, Workspace
from ..report import FULL_RANK, Match
from .emit import emit, with_example
from .factored import Factored
from .values import example, example_shape, hints_of, requires_grad, shape_of, tensor_of, value_of
from .weights import Weight

WIDER = ("cos", "sin", *norm.argument_names("q"), *norm.argument_names("k"))
"""Arguments that keep their dtype: a rotation or a norm may be computed in a wider one."""


@dataclass(frozen=True)
class Deferred:
    """An argument whose graph nodes are made only when the region is replaced.

    Attributes:
        build: makes them at the graph's insertion point and returns the last.
        leaves: nodes it reads.
    """

    build: Callable[[Graph], Node]
    leaves: tuple[Node, ...]


@dataclass(frozen=True)
class Region:
    """Nodes that one operator call replaces.

    Attributes:
        kind: ``"attention"``, ``"mlp"`` or ``"linear"``.
        operator: the overload that replaces them.
        inputs: the activations the operator reads, first ``x``.
        members: projections by role, as the operator names them.
        constants: remaining keyword arguments: plain values, nodes, or nodes still to be made.
        nodes: everything the operator computes.
        plan: asks the planner for a strategy.
        output: the one of the nodes that is the result.
        absorb: makes the region that the strategy ``absorbed`` stands for, or ``None`` where it has no such form.
        shared: those of the nodes that something else may read, too: they stay, and the operator computes them again.
        note: for the report, behind the plan's reason.
    """

    kind: str
    operator: torch._ops.OpOverload
    inputs: dict[str, Node]
    members: dict[str, Factored]
    constants: dict[str, Any]
    nodes: tuple[Node, ...]
    plan: Callable[[Options], Plan]
    output: Node
    absorb: Callable[["Region"], "Region"] | None = None
    shared: frozenset[Node] = frozenset()
    note: str = ""

    @property
    def weights(self) -> list[Weight]:
        """All factors and biases."""
        return weights_of(self.members)

    @property
    def reads(self) -> list[Node]:
        """Nodes outside the region whose tensors the operator reads."""
        return list(dict.fromkeys([*self.inputs.values(), *self.reads_beside_inputs]))

    @property
    def reads_beside_inputs(self) -> list[Node]:
        """What factors, biases and the remaining arguments are made of."""
        nodes = [value for value in self.constants.values() if isinstance(value, Node)]
        deferred = [value for value in self.constants.values() if isinstance(value, Deferred)]
        leaves = [leaf for item in (*self.weights, *deferred) for leaf in item.leaves]
        return list(dict.fromkeys([*leaves, *nodes]))

    def emit(self, graph: Graph, plan: Plan) -> Node:
        """Write the operator call at the graph's insertion point; its rows flattened if the result's rows are."""
        if plan.strategy == Strategy.ABSORBED and self.absorb is not None:
            return replace(self.absorb(self), absorb=None).emit(graph, plan)
        arguments: dict[str, Any] = dict(self.inputs)
        built: dict[int, Node] = {}
        for role, member in self.members.items():
            for name, weight in zip(argument_names(role), member.projection, strict=True):
                if weight is not None:
                    arguments[name] = weight.build(graph, built)
        for name, value in self.constants.items():
            arguments[name] = value.build(graph) if isinstance(value, Deferred) else value
        arguments |= {name: self._cast(graph, value) for name, value in arguments.items() if name not in WIDER}
        arguments["strategy"] = str(plan.strategy)
        arguments["workspace_bytes"] = _workspace_bytes(graph, self.inputs["x"], plan.workspace)
        keywords = in_schema_order(self.operator, arguments)
        node = graph.create_node("call_function", self.operator, kwargs=keywords, name=self.kind)
        node.meta = dict(self.output.meta)
        with_example(node, self.operator, tracked=requires_grad(self.output))
        flattened = len(shape_of(node) or ()) == len(shape_of(self.output) or ()) + 1
        return emit(graph, "flatten", node, 0, 1) if flattened else node

    def _cast(self, graph: Graph, argument: Any) -> Any:
        """A floating tensor in the result's dtype, from which it differs under autocast only."""
        tensor, result = tensor_of(argument), tensor_of(self.output)
        if tensor is None or result is None or not tensor.is_floating_point() or tensor.dtype == result.dtype:
            return argument
        return emit(graph, "to", argument, result.dtype)

    def match(self, plan: Plan) -> Match:
        """The line of the report."""
        ranks = {role: FULL_RANK if member.rank is None else member.rank for role, member in self.members.items()}
        return Match(
            kind=self.kind,
            module=module_of(self.nodes, self.output),
            ranks=ranks,
            strategy=plan.strategy,
            reason=f"{plan.reason}; {self.note}" if self.note else plan.reason,
            transient_before=plan.transient_before,
            transient_after=plan.transient_after,
        )


def in_schema_order(operator: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """An operator's keyword arguments in the order of its schema, without those that equal their defaults."""
    defaults = {a.name: a.default_value for a in operator._schema.arguments}
    given = {name: arguments[name] for name in defaults if name in arguments}
    return {name: value for name, value in given.items() if isinstance(value, Node) or value != defaults[name]}


def _name_of(device: torch.device) -> str:
    """The name that the planner knows a device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


def _workspace_bytes(graph: Graph, x: Node, workspace: Workspace) -> int | Node:
    """The planner's bound for this input: a number, or nodes that compute it where the shape is dynamic."""
    elements = value_of(x).numel()
    if isinstance(elements, int):
        return int(workspace.bytes_for(sympy.Integer(elements)))
    if not workspace.per_element:
        return workspace.least
    numel = emit(graph, "numel", x)
    needed = _share(graph, numel, workspace.per_element)
    if workspace.beside:
        left = emit(graph, operator.sub, _share(graph, numel, workspace.in_all), workspace.beside)
        needed = emit(graph, torch.sym_min, needed, left)
    return emit(graph, torch.sym_max, workspace.least, needed)


def _share(graph: Graph, elements: Node, per_element: Fraction) -> Node:
    """``elements * per_element``, rounded down."""
    needed = emit(graph, operator.mul, elements, per_element.numerator)
    return emit(graph, operator.floordiv, needed, per_element.denominator) if per_element.denominator > 1 else needed


def present(**members: Factored | None) -> dict[str, Factored]:
    """The projections of a region by role, absent ones left out."""
    return {role: member for role, member in members.items() if member is not None}


def weights_of(members: dict[str, Factored]) -> list[Weight]:
    """All factors and biases of projections."""
    return [weight for member in members.values() for weight in member.projection if weight is not None]


def module_of(nodes: tuple[Node, ...], output: Node) -> str:
    """The path of the innermost module that all nodes come from; the output's name where the graph has no paths."""
    paths = [path for path in map(_path_of, nodes) if path is not None]
    if not paths:
        return output.name
    common = paths[0]
    for path in paths[1:]:
        common = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(common, path, strict=False))]
    return ".".join(common) or "model"


_ROOT = re.compile(r"^[LG]\['\w+'\](\[\d+\])?")
"""What Dynamo calls the module that is compiled: ``L['self']``, ``L['args'][0]``, or a name in a function's scope."""
_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|([^.\[\]]+)")
"""A key, a number or an attribute."""
_BETWEEN = ("_modules", "__self__")
"""Attributes on the way that are no modules: the dictionary of children, and what a bound method belongs to."""


def _path_of(node: Node) -> list[str] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    steps = ("".join(step) for step in _STEP.findall(_ROOT.sub("", path)))
    return [step for step in steps if step not in _BETWEEN]


def sizes_of(x: Node, members: dict[str, Factored], context: Node | None = None) -> dict[str, Any]:
    """The part of a planner's shape that all regions share; ``context`` is an input beside ``x``."""
    projections = {role: member.projection for role, member in members.items()}
    tensor, shape = example(x), example_shape(x)
    inputs = (x, context or x)
    read = [*inputs, *(leaf for weight in weights_of(members) for leaf in weight.leaves)]
    return {
        "ranks": {role: None if p.down is None else p.down.shape[0] for role, p in projections.items()},
        "features": {role: p.up.shape[0] for role, p in projections.items()},
        "in_features": shape[-1],
        "itemsize": tensor.element_size(),
        "device": _name_of(tensor.device),
        "hints": {symbol: hint for node in inputs for symbol, hint in hints_of(node).items()},
        "differentiated": torch.is_grad_enabled() and any(map(requires_grad, read)),
    }


def rows_of(node: Node) -> sympy.Expr:
    """Number of rows of a tensor: the product of its leading dimensions."""
    return sympy.Mul(*example_shape(node)[:-1])


def chip_of(node: Node) -> Target | None:
    """What kernels know about the chip that a tensor is on, if it is here."""
    value = tensor_of(node)
    if value is None or value.device.type != "cuda" or not torch.cuda.is_available():
        return None
    return target_of(value.device)


def is_on_gpu(node: Node) -> bool:
    """Whether a tensor is where the operators have kernels of their own."""
    value = tensor_of(node)
    return value is not None and value.device.type == "cuda"
