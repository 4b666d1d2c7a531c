"""A graph's nodes in the order of execution, and which of them do more than compute a result."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from .mutation import mutated_arguments

_MODE_SWITCHES = {
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
}


@dataclass(frozen=True)
class Order:
    """The order of execution, as it is before a rule replaces anything.

    It serves the whole run of a rule: whether a node writes or switches lies in its target, which never changes, and
    the operators that come in do neither. What a writer overwrites may be replaced, and is asked each time.

    Attributes:
        position: number of each node.
        writers: nodes that overwrite some of their arguments, in order.
        switches: nodes that change a mode of PyTorch, in order.
    """

    position: dict[Node, int]
    writers: tuple[Node, ...]
    switches: tuple[Node, ...]

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> "Order":
        """The order of a graph's nodes."""
        position = {node: number for number, node in enumerate(nodes)}
        switches = (node for node in position if getattr(node.target, "__name__", "") in _MODE_SWITCHES)
        return cls(position, tuple(filter(mutated_arguments, position)), tuple(switches))
