"""A graph's nodes in the order of execution, and which of them do more than compute a result."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from .ancestors import ancestors
from .mutation import mutated_arguments

_GRADIENTS = "_set_grad_enabled"
_AUTOCAST, _NO_AUTOCAST = "_enter_autocast", "_exit_autocast"
_MODE_SWITCHES = {
    _GRADIENTS,
    _AUTOCAST,
    _NO_AUTOCAST,
    "_enter_inference_mode",
    "_exit_inference_mode",
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
}

_TRANSFORMS = {
    f"_{transform}_increment_nesting": f"_{transform}_decrement_nesting" for transform in ("grad", "jvp", "vmap")
} | {"_enter_dual_level": "_exit_dual_level"}
"""Where ``torch.func`` and forward-mode differentiation begin and end."""


@dataclass(frozen=True)
class Order:
    """The order of execution, as it is before a rule replaces anything.

    It serves the whole run of a rule: whether a node writes or switches lies in its target, which never changes, and
    the operators that come in do neither. What a writer overwrites may be replaced, and is asked each time.

    Attributes:
        position: number of each node.
        writers: nodes that overwrite some of their arguments, in order.
        switches: nodes that change a mode of PyTorch, in order.
        transformed: nodes whose operations are differentiated or batched within the graph.
    """

    position: dict[Node, int]
    writers: tuple[Node, ...]
    switches: tuple[Node, ...]
    transformed: frozenset[Node]

    @classmethod
    def of(cls, nodes: Iterable[Node], transformed: bool = False) -> "Order":
        """The order of a graph's nodes, the graph being the body of a ``transformed`` operator or not."""
        position = {node: number for number, node in enumerate(nodes)}
        switches = (node for node in position if _name(node) in _MODE_SWITCHES)
        writers = filter(mutated_arguments, position)
        within = position if transformed else transformed_among(position)
        return cls(position, tuple(writers), tuple(switches), frozenset(within))

    def gradients_at(self, node: Node) -> bool:
        """Whether gradients are on where a node is computed."""
        switches = [switch for switch in self._switches_before(node) if _name(switch) == _GRADIENTS]
        return bool(switches[-1].args[0]) if switches else torch.is_grad_enabled()

    def autocast_at(self, node: Node) -> frozenset[Node]:
        """The graph's own blocks of autocast that a node is computed in, by their first nodes."""
        before = self._switches_before(node)
        left = [switch.args[0] for switch in before if _name(switch) == _NO_AUTOCAST]
        return frozenset(switch for switch in before if _name(switch) == _AUTOCAST and switch not in left)

    def _switches_before(self, node: Node) -> list[Node]:
        return [switch for switch in self.switches if self.position[switch] < self.position[node]]


def _name(node: Node) -> str:
    """Name of the function that a node calls."""
    return getattr(node.target, "__name__", "")


def transformed_among(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes whose operations are batched within the graph, or differentiated and perhaps differentiated again."""
    nodes, ends = list(nodes), list[str]()
    again = _differentiated_again(nodes)
    for node in nodes:
        name = _name(node)
        if name in _TRANSFORMS:
            ends.append(_TRANSFORMS[name])
        elif ends and name == ends[-1]:
            ends.pop()
        elif ends or node in again:
            yield node


def _differentiated_again(nodes: Iterable[Node]) -> set[Node]:
    """What gradients are taken of within the graph that have gradients themselves (``create_graph``)."""
    taken = [n for n in nodes if n.target is torch.autograd.grad and n.kwargs.get("create_graph")]
    return {node for node in ancestors(taken) if node.all_input_nodes}
