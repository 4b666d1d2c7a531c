"""Which tensors a node overwrites. In doubt it overwrites."""

import inspect
import operator
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

from .values import share_memory, tensor_of, value_of

_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
} | {operator.setitem}
_IN_PLACE_METHODS = {f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS}
_STATISTICS = ("running_mean", "running_var")
"""What batch and instance norms update in training, whatever their schemas say."""
_NORMS = {functional.batch_norm: 1, functional.instance_norm: 1, torch.batch_norm: 3, torch.instance_norm: 3}
"""Position of the first of them."""
_EMBEDDINGS = (functional.embedding, functional.embedding_bag)
"""Their weight, the second argument, is overwritten where a fourth, ``max_norm``, bounds its rows."""
_KNOWN_LIBRARIES = ("torch", "_operator", "operator", "builtins", "math")


def mutated_arguments(node: Node) -> list[Node]:
    """The nodes whose tensors ``node`` overwrites, views of them not included."""
    if node.op == "call_method":
        name = str(node.target)
        writes = _says_in_place(name) or name in _IN_PLACE_METHODS
        return _nodes(node.args[:1] if writes else [node.kwargs.get("out")])
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        return _by_schema(node, [node.target])
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _by_schema(node, [getattr(node.target, name) for name in node.target.overloads()])
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _by_bodies(node)
    return _by_function(node)


def is_overwritten(node: Node) -> bool:
    """Whether the graph writes to the tensor that a node has made, also through views of it."""
    views, seen = [node], {node}
    while views:
        view = views.pop()
        if any(view in mutated_arguments(user) for user in view.users):
            return True
        further = {user for user in view.users if share_memory(user, node) or tensor_of(user) is None} - seen
        views += further
        seen |= further
    return False


def _says_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _by_schema(node: Node, overloads: list[torch._ops.OpOverload]) -> list[Node]:
    mutated = []
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if is_write or argument.name in _STATISTICS:
                mutated += _nodes([*node.args[position : position + 1], node.kwargs.get(argument.name)])
    return mutated


def _by_bodies(node: Node) -> list[Node]:
    """A higher-order operator overwrites what its bodies may; the wrapper of a kernel may overwrite anything."""
    bodies = [body for above in node.all_input_nodes if isinstance(body := _body(above), GraphModule)]
    if bodies and not any(mutated_arguments(inner) for body in bodies for inner in body.graph.nodes):
        return []
    return node.all_input_nodes


def _body(node: Node) -> object:
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    return getattr(node.graph.owning_module, str(node.target), None)


def _by_function(node: Node) -> list[Node]:
    function = node.target
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", None) or "torch"
    known = module.split(".")[0] in _KNOWN_LIBRARIES
    if not known and isinstance(value_of(node), torch.Tensor | tuple | list):
        return node.all_input_nodes
    if function in _NORMS:
        place = _NORMS[function]
        return _nodes([*node.args[place : place + 2], *map(node.kwargs.get, _STATISTICS)])
    if function in _EMBEDDINGS:
        bounded = node.kwargs.get("max_norm", *node.args[3:4]) is not None
        return _nodes([*node.args[1:2], node.kwargs.get("weight")]) if bounded else []
    named = _says_in_place(name) and function is not getattr(operator, name, None)  # operator.and_ is no write
    if function in _IN_PLACE_OPERATORS or named or _asks_for_in_place(node):
        return _nodes(node.args[:1] or node.kwargs.values())  # which keyword is the first argument nothing says
    return _nodes([node.kwargs.get("out")])


def _asks_for_in_place(node: Node) -> bool:
    """``relu(x, inplace=True)``, by keyword or position."""
    if not inspect.isfunction(node.target) or "inplace" not in node.target.__code__.co_varnames:
        return node.kwargs.get("inplace") is True
    bound = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)
    return bound.arguments.get("inplace") is True


def _nodes(arguments: Iterable[object]) -> list[Node]:
    found: list[Node] = []
    for argument in arguments:
        map_arg(argument, found.append)  # pyright: ignore[reportArgumentType]
    return found
