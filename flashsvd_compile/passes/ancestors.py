"""What a node is computed from."""

from collections.abc import Callable, Iterable, Iterator

from torch.fx import Node


def ancestors(nodes: Iterable[Node], through: Callable[[Node], bool] = lambda node: True) -> Iterator[Node]:
    """The nodes that these are computed from, each once; of those that ``through`` is false of, nothing above.

    Lazy: whoever stops asking stops the walk.
    """
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        for above in waiting.pop().all_input_nodes:
            if above not in seen:
                seen.add(above)
                yield above
                if through(above):
                    waiting.append(above)
