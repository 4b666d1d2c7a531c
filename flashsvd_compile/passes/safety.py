"""What must hold before a region may be replaced.

The operator runs where the region's last node stood and reads its inputs there. That is the same computation only if
nothing that the region reads or computes is overwritten between its first node and its last. It is a gain only if no
intermediate is wanted elsewhere, except what the region is planned to share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from ..report import RefusalReason
from .affine import read_affine
from .ancestors import ancestors
from .factored import Obstacle
from .mutation import mutated_arguments
from .order import Order
from .region import Region
from .values import example, requires_grad, share_memory, size_of, storage_of, tensor_of
from .vocabulary import live_dropout
from .weights import is_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cpu", "cuda")


def obstacle_to(region: Region, order: Order) -> Obstacle | None:
    """The first reason not to replace ``region``."""
    return (
        emptiness(region)
        or other_user(region)
        or tensor_subclass(region)
        or dropout(region)
        or mode_change(region, order)
        or gradient_mode(region, order)
        or autocast_of_weights(region, order)
        or mutation(region, order)
        or mutation_within(region, order)
        or mutation_before_gradients(region, order)
        or device(region)
        or dtype(region)
        or features(region)
    )


def emptiness(region: Region) -> Obstacle | None:
    """No rows, or no items: there is nothing to plan for."""
    result = tensor_of(region.output)
    if result is not None and any(isinstance(size, int) and size == 0 for size in result.shape):
        return Obstacle(RefusalReason.UNPROFITABLE, f"{region.output.name!r} has no elements")
    return None


def other_user(region: Region) -> Obstacle | None:
    """An intermediate that something outside the region reads."""
    inside = set(region.nodes)
    for node in region.nodes:
        if node is region.output or node in region.shared:
            continue
        for user in node.users:
            if user not in inside:
                sentence = f"the intermediate {node.name!r} is also used by {user.name!r}"
                return Obstacle(RefusalReason.OTHER_USER, sentence)
    return None


def dropout(region: Region) -> Obstacle | None:
    """A dropout that is not provably off."""
    for node in region.nodes:
        if live_dropout(node):
            return Obstacle(RefusalReason.LIVE_DROPOUT, f"{node.name!r} may drop elements")
    return None


def mode_change(region: Region, order: Order) -> Obstacle | None:
    """A switch of grad mode, autocast or the like while the region is being computed."""
    first, last = _span(region, order)
    for node in order.switches:
        if first < order.position[node] < last:
            sentence = f"{node.name!r} changes a mode of PyTorch before {region.output.name!r}"
            return Obstacle(RefusalReason.MODE_CHANGED, sentence)
    return None


def gradient_mode(region: Region, order: Order) -> Obstacle | None:
    """Weights that were computed where gradients were off, or on, and are read where they are not: what the operator
    reads instead, which they were computed from, has gradients of its own.
    """
    here = order.gradients_at(region.output)
    for node in _computed_weights(region):
        if any(map(requires_grad, node.all_input_nodes)) and order.gradients_at(node) != here:
            sentence = f"{node.name!r} and {region.output.name!r} are computed in different grad modes"
            return Obstacle(RefusalReason.MODE_CHANGED, sentence)
    return None


def autocast_of_weights(region: Region, order: Order) -> Obstacle | None:
    """Weights that were computed under another autocast: what they are computed from would be rounded before."""
    here = order.autocast_at(region.output)
    for node in _computed_weights(region):
        is_view = any(share_memory(node, source) for source in node.all_input_nodes)
        if not is_view and order.autocast_at(node) != here:
            sentence = f"{node.name!r} and {region.output.name!r} are computed under different autocasts"
            return Obstacle(RefusalReason.MODE_CHANGED, sentence)
    return None


def _computed_weights(region: Region) -> set[Node]:
    """What the graph computes the region's weights by, however little of it the operator still needs."""
    outside = {*region.nodes, *region.inputs.values()}

    def is_computed(node: Node) -> bool:
        return node not in outside and node.op not in ("placeholder", "get_attr") and is_weight(node)

    return set(filter(is_computed, ancestors(region.nodes, through=is_computed)))


def mutation(region: Region, order: Order) -> Obstacle | None:
    """An in-place write to anything the region reads or computes, while it is being computed."""
    inside = set(region.nodes)
    first, last = _span(region, order)
    behind_views = [*region.reads_beside_inputs, *_computed_weights(region)]
    for node in order.writers:
        if order.position[node] >= last or node in inside:
            continue
        # Views of weights and tables were made before the region's first node: what is behind them is read later now,
        # and what weights were computed from instead of them.
        watched = (*region.reads, *region.nodes) if order.position[node] > first else behind_views
        for written in mutated_arguments(node):
            if written in watched:
                return Obstacle(RefusalReason.MUTATED, f"{node.name!r} overwrites {written.name!r} before it is read")
            alias = _alias_among(watched, written)
            if alias is not None:
                sentence = f"{node.name!r} overwrites {written.name!r}, which shares memory with {alias.name!r}"
                return Obstacle(RefusalReason.ALIASED, sentence)
    return None


def mutation_within(region: Region, order: Order) -> Obstacle | None:
    """An operation of the region's own that writes elsewhere than over its intermediates (``out=``), or to what the
    region reads, or computed before and reads afterwards by another name, or what the rest of the graph reads behind
    it. The operator works on values only.
    """
    inside = set(region.nodes)
    outside = [node for node in region.reads if node not in inside]
    for writer in order.writers:
        if writer not in inside:
            continue
        at, later = order.position[writer], [n for n in region.nodes if order.position[n] > order.position[writer]]
        stale = [n for reader in later for n in reader.all_input_nodes if n is not writer]
        stale = [n for n in stale if order.position.get(n, at) < at]
        for written in mutated_arguments(writer):
            if written not in inside:
                return Obstacle(RefusalReason.MUTATED, f"{writer.name!r} overwrites {written.name!r}")
            behind = [] if writer in region.shared else _read_behind(writer, inside)
            alias = _alias_among((*outside, *stale, *behind), written)
            if alias is not None:
                sentence = f"{writer.name!r} overwrites {written.name!r}, which shares memory with {alias.name!r}"
                return Obstacle(RefusalReason.ALIASED, sentence)
    return None


def _read_behind(writer: Node, inside: set[Node]) -> list[Node]:
    """What nodes outside a region read behind a writer, and what was there before it."""
    readers = (node for node in writer.graph.nodes if writer < node and node not in inside)
    return [node for reader in readers for node in reader.all_input_nodes if node < writer]


def mutation_before_gradients(region: Region, order: Order) -> Obstacle | None:
    """An in-place write, after the region, to what it would have to keep for its gradients: an operator keeps all that
    it reads, where the model may need none of it.
    """
    if not order.gradients_at(region.output) or not any(map(requires_grad, region.reads)):
        return None
    found = overwritten_behind(region.output, region.reads, order)
    if found is None:
        return None
    writer, written = found
    sentence = f"{writer.name!r} overwrites {written.name!r}, which gradients would be computed from"
    return Obstacle(RefusalReason.MUTATED, sentence)


def overwritten_behind(node: Node, reads: Sequence[Node], order: Order) -> tuple[Node, Node] | None:
    """The first write behind ``node`` to the memory of one of ``reads``, and which of them that is."""
    for writer in order.writers:
        if order.position[writer] > order.position[node]:
            for written in mutated_arguments(writer):
                alias = _alias_among(reads, written)
                if alias is not None:
                    return writer, alias
    return None


def _span(region: Region, order: Order) -> tuple[int, int]:
    """Positions of the region's first node and of its result."""
    return min(order.position[node] for node in region.nodes), order.position[region.output]


def _alias_among(watched: Sequence[Node], written: Node) -> Node | None:
    memory = storage_of(written)
    if memory is None:
        return None
    return next((node for node in watched if (known := storage_of(node)) is not None and known == memory), None)


def _tensors(region: Region) -> list[tuple[str, Tensor]]:
    """The floating tensors that the operator takes and returns, by name."""
    nodes = [(node.name, tensor_of(node)) for node in (*region.inputs.values(), region.output)]
    weights = [(weight.leaves[0].name, weight.value) for weight in region.weights]
    return [(name, tensor) for name, tensor in (*nodes, *weights) if tensor is not None]


def tensor_subclass(region: Region) -> Obstacle | None:
    """DTensor and the like, whose operations mean more than their local tensors'; and those by name only, which look
    like tensors in the graph but come to the operator as they are.
    """
    for name, tensor in _tensors(region):
        if not _is_plain(tensor):
            return Obstacle(RefusalReason.TENSOR_SUBCLASS, f"{name!r} is a {type(tensor).__name__}")
    for node in (*region.inputs.values(), *(leaf for weight in region.weights for leaf in weight.leaves)):
        given = getattr(node.meta.get("grapharg"), "example", None)  # what Dynamo was called with
        if isinstance(given, Tensor) and not _is_plain(given):
            return Obstacle(RefusalReason.TENSOR_SUBCLASS, f"{node.name!r} is a {type(given).__name__}")
    return None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor)


def device(region: Region) -> Obstacle | None:
    """Devices without an implementation, or a mixture of devices."""
    devices = {tensor.device for _, tensor in _tensors(region)}
    for found in devices:
        if found.type not in DEVICES:
            return Obstacle(RefusalReason.UNSUPPORTED_DEVICE, f"no implementation for {found.type!r}")
    if len(devices) > 1:
        return Obstacle(RefusalReason.UNSUPPORTED_DEVICE, f"tensors on {', '.join(sorted(map(str, devices)))}")
    return None


def features(region: Region) -> Obstacle | None:
    """A number of features that the graph does not know: Dynamo may take any size of 1 for one of its symbols."""
    inputs = [(node.name, tensor_of(node)) for node in region.inputs.values()]
    sizes = [(name, tuple(tensor.shape[-1:])) for name, tensor in inputs if tensor is not None]
    sizes += [(weight.leaves[0].name, weight.shape) for weight in region.weights]
    for name, shape in sizes:
        if not all(size_of(size).is_Integer for size in shape):
            return Obstacle(RefusalReason.UNKNOWN_SIZE, f"{name!r} has {shape[-1]} features")
    return None


def dtype(region: Region) -> Obstacle | None:
    """A dtype that the operators do not compute in, or a conversion between the factors.

    Autocast leaves no trace in the graph except that a projection's result is narrower than what goes into it; the
    operator's inputs are then cast as autocast does (see :meth:`Region.emit`).
    """
    result = example(region.output)
    if result.dtype not in DTYPES:
        return Obstacle(RefusalReason.UNSUPPORTED_DTYPE, f"{result.dtype} is left to the inner backend")
    for name, tensor in _tensors(region):
        by_autocast = tensor.dtype == torch.float32 and result.dtype != torch.float32
        if tensor.dtype != result.dtype and not by_autocast:
            return Obstacle(RefusalReason.UNSUPPORTED_DTYPE, f"{name!r} is {tensor.dtype}, the result {result.dtype}")
    for node in region.nodes:
        tensor = tensor_of(node)
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == result.dtype:
            continue
        if tensor.element_size() <= result.element_size() or read_affine(node) is not None:
            sentence = f"{node.name!r} is {tensor.dtype}, the result {result.dtype}"
            return Obstacle(RefusalReason.UNSUPPORTED_DTYPE, sentence)
    return None
