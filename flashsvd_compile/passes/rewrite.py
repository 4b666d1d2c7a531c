"""Runs the rules over a graph, in order, and reports what they did."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import getitem
from typing import Any

import torch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from ..errors import FlashSVDError, GraphError, shown
from ..options import INPUT_NORM, PACKING, RESIDUAL, Options, Strategy
from ..planner import Plan
from ..report import Match, Refusal, RefusalReason, RewriteReport
from .attention import read_attention
from .factored import Obstacle
from .input_norm import absorb_norms
from .linear import read_linear
from .masks import read_mask
from .mlp import read_mlp
from .mutation import mutated_arguments
from .order import Order, transformed_among
from .packing import pack_projections
from .region import Region, module_of
from .residual import absorb_residuals
from .safety import obstacle_to
from .transforms import NESTED_REGION, TRANSFORM, transformed_pairs
from .values import STORAGE, is_same_tensor, requires_grad, shape_of, storage_of, tensor_of, value_of

logger = logging.getLogger(__name__)

Rule = Callable[[Node], Region | Obstacle | None]


def rules() -> dict[str, Rule]:
    """The rules in their order, for one graph.

    Layers share their masks, and each is read once. What a mask says holds as long as the rules run: they take later
    nodes first and replace nothing that a mask still to be asked for is made of, and no operator of theirs writes in
    place. With the graph's rules the readings are forgotten.
    """
    return {
        "attention": partial(read_attention, read_mask=cache(read_mask)),
        "mlp": read_mlp,
        "linear": read_linear,
    }


def rewrite(
    graph_module: GraphModule,
    options: Options | Mapping[str, Any] | None = None,
) -> RewriteReport:
    """Replace the low-rank regions of a graph by operators, in place.

    Args:
        graph_module: a graph by Dynamo or ``torch.export``; its nodes must carry example values.
        options: see :class:`~flashsvd_compile.Options`; nothing is printed or written for ``debug``.

    Returns:
        What was rewritten, and why the rest was not. A second run over the result changes nothing.

    Raises:
        UnknownOptionError, InvalidOptionError: bad options.
        GraphError: no graph, or one whose inputs carry no example values, or not of one fake mode, as by ``make_fx`` of
            plain tensors.
    """
    if not isinstance(graph_module, GraphModule):
        raise GraphError(shown(graph_module), "is not a graph")
    inputs = graph_module.graph.find_nodes(op="placeholder")
    name = f"the graph of {', '.join(node.name for node in inputs)}"
    if inputs and all(value_of(node) is None for node in inputs):
        raise GraphError(name, "carries no example values")
    values = tree_leaves([value_of(node) for node in graph_module.graph.nodes])
    modes = {id(value.fake_mode) for value in values if isinstance(value, FakeTensor)}
    if len(modes) > 1:
        raise GraphError(name, f"carries example values of {len(modes)} fake modes")
    return apply_rules(graph_module, Options.parse(options))


def apply_rules(graph_module: GraphModule, options: Options, within: str | None = None) -> RewriteReport:
    """As :func:`rewrite`, of any graph, which runs ``within`` what forbids rewriting or not."""
    report, graph = RewriteReport(), graph_module.graph
    for body, what in _bodies(graph_module).items():
        report += apply_rules(body, options, within or what)
    follow_in_place_results(graph)
    drop_unused_sizes(graph)
    report.refusals += transformed_pairs(graph.nodes if within else transformed_among(graph.nodes), within or TRANSFORM)
    kept: set[Node] = set()
    for name, rule in rules().items():
        if name not in options.disable:
            report += _apply(rule, graph, options, within is not None, kept)
    if PACKING not in options.disable:
        pack_projections(graph)
    if RESIDUAL not in options.disable:
        absorb_residuals(graph)
    if INPUT_NORM not in options.disable:
        absorb_norms(graph, options)
    for node in graph.nodes:
        node.meta.pop(STORAGE, None)
    graph.lint()
    graph_module.recompile()
    logger.debug("%s", report)
    return report


def _bodies(graph_module: GraphModule) -> dict[GraphModule, str | None]:
    """Bodies of higher-order operators, such as checkpointing, and what they are within that forbids rewriting.

    Dynamo leaves bodies behind that it has inlined, which nothing reads.
    """
    read = {node.target for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    children = graph_module.named_children()
    bodies = {name: body for name, body in children if name in read and isinstance(body, GraphModule)}
    if not bodies:
        return {}
    within, order = {}, Order.of(graph_module.graph.nodes)
    for node in graph_module.graph.find_nodes(op="call_function", target=invoke_subgraph):
        if order.gradients_at(node) and any(map(requires_grad, node.all_input_nodes)):
            within |= dict.fromkeys(_attributes_of(node), NESTED_REGION)
    for node in order.transformed:
        within |= dict.fromkeys(_attributes_of(node), TRANSFORM)
    return {body: within.get(name) for name, body in bodies.items()}


def _attributes_of(node: Node) -> list[Any]:
    """Names of what a node reads of the graph's own module."""
    return [read.target for read in node.all_input_nodes if read.op == "get_attr"]


def _apply(rule: Rule, graph: Graph, options: Options, transformed: bool, kept: set[Node]) -> RewriteReport:
    """Run one rule at every node, last node first: the outermost projection sees the whole region.

    Args:
        kept: nodes of the regions that plans have left alone; the rule's are added. A projection of such a region that
            is left alone as well is not reported beside it.
    """
    report = RewriteReport()
    order = Order.of(graph.nodes, transformed)
    for node in reversed(order.position):
        found = None if node._erased or node in order.transformed else rule(node)
        outcome = _replace(found, graph, order, options) if isinstance(found, Region) else found
        if isinstance(outcome, Match):
            report.matches.insert(0, outcome)
        elif isinstance(outcome, Obstacle):
            if isinstance(found, Region) and outcome.reason == RefusalReason.UNPROFITABLE:
                if kept.issuperset(found.nodes):
                    continue
                kept.update(found.nodes)
            site = module_of(found.nodes if isinstance(found, Region) else (node,), node)
            refusal = Refusal(outcome.reason, site, outcome.sentence)
            if not _is_known(refusal, report):
                report.refusals.insert(0, refusal)
        if outcome is not None:
            logger.debug("%s: %s", node.name, outcome)
    return report


def _is_known(refusal: Refusal, report: RewriteReport) -> bool:
    """Whether it was met from another node of its site: sentences name nodes, but the planner's, which alike layers
    share.
    """
    if refusal.reason == RefusalReason.UNPROFITABLE:
        return refusal in report.refusals
    return refusal.sentence in {known.sentence for known in report.refusals}


def _replace(region: Region, graph: Graph, order: Order, options: Options) -> Match | Obstacle:
    """Put the operator in the region's place, unless that would be wrong or a loss."""
    obstacle = obstacle_to(region, order)
    if obstacle is not None:
        return obstacle
    plan = region.plan(options)
    if plan.strategy == Strategy.KEPT:
        return Obstacle(RefusalReason.UNPROFITABLE, plan.reason)
    match = region.match(plan)
    operator = _emit(region, plan, graph)
    if isinstance(operator, Obstacle):
        return operator
    operator.meta[STORAGE] = storage_of(region.output)
    region.output.replace_all_uses_with(operator)
    _erase(sorted(region.nodes, key=order.position.__getitem__), graph)
    return match


def _emit(region: Region, plan: Plan, graph: Graph) -> Node | Obstacle:
    """The operator in front of the region's result. Not if it does not take what was read, or gives something else: the
    region was misread then, and a model that runs must not stop because of that.
    """
    before = region.output.prev
    try:
        with graph.inserting_before(region.output):
            operator = region.emit(graph, plan)
    except (FlashSVDError, RuntimeError) as error:
        found = f"the operator does not take what was read of {region.output.name!r}: {error}"
    else:
        shape, wanted = shape_of(operator) or (), shape_of(region.output) or ()
        # Numbers only: of symbols the same size may be spelled differently.
        numbers = [pair for pair in zip(shape, wanted, strict=False) if all(size.is_Integer for size in pair)]
        if len(shape) == len(wanted) and all(size == other for size, other in numbers):
            return operator
        found = f"the operator's result is {shape} where {region.output.name!r} is {wanted}"
    while region.output.prev is not before:
        graph.erase_node(region.output.prev)
    return Obstacle(RefusalReason.MISREAD, found)


def _erase(nodes: Sequence[Node], graph: Graph) -> None:
    """Remove the region's nodes, which nothing uses any more, and views of weights that only they used."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        inputs = node.all_input_nodes
        if node._erased or node.users:
            continue
        graph.erase_node(node)
        waiting += [i for i in inputs if not i.users and i.op in ("call_function", "call_method") and _is_pure_view(i)]


def _is_pure_view(node: Node) -> bool:
    return tensor_of(node) is not None and not mutated_arguments(node)


def drop_unused_sizes(graph: Graph) -> None:
    """Erase sizes that nothing reads, as Dynamo leaves them in the bodies of checkpoints: they look like readers."""
    for node in reversed(graph.nodes):
        if not node.users and isinstance(value_of(node), int | torch.SymInt | torch.Size) and _is_pure_size(node):
            graph.erase_node(node)


def _is_pure_size(node: Node) -> bool:
    return (node.op, node.target) == ("call_method", "size") or node.target in (getitem, getattr)


def follow_in_place_results(graph: Graph) -> None:
    """Let later readers of an overwritten tensor read the overwriting node instead.

    ``y.add_(b)`` returns ``y`` itself, so the graph computes the same; but the flow of data becomes visible::

        y = linear(x, w); y.add_(b); z = gelu(y)        ->        y = linear(x, w); y1 = y.add_(b); z = gelu(y1)

    What may overwrite ``y`` but returns another tensor, as functions of other libraries do, is not read instead.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in order:
        for written in mutated_arguments(node):
            returned = node.args[:1] == (written,) and is_same_tensor(node, written)
            if returned and written.op != "placeholder":
                written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
