"""The strategy for a region: the fastest, and of equally fast ones the one with the least memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from types import MappingProxyType

import sympy

from ..options import AUTO, Options, Strategy
from ..report import format_bytes
from . import memory, time
from .device import Device, device_of
from .shapes import AttentionShape, LinearShape, MlpShape, RankSpace, RegionShape

NOISE = 0.08
"""Predicted times that differ by less than this share count as equal: the formulas are no better than that."""
LOSS = 0.05
"""Share of the time as written by which a choice may be predicted to take longer, for less memory."""
SHARES_OF_INPUT = (Fraction(1, 2), Fraction(1), Fraction(3, 2), Fraction(2), Fraction(4))
"""Workspaces that a region may take where they grow with its input."""
SHARE_FOR_PRODUCTS = Fraction(1, 11)
"""Share of the input that products of factors may take beside a workspace; what they take beyond it comes off that.

A region's peak is its input, its result, the workspace and those products: with the least workspace at most
1 + 1 + 1/2 + 1/11 = 2.59 inputs; a 10th would leave no room for what an allocator rounds up (0.4 MiB measured). BERT's
keys and values of 32x512 are 2 inputs of 24 MiB, a 16th of an input an item. In 12 MiB they come by 8 items, and three
weights of 768x768 that the graph multiplies out, 3.4 MiB, make that 2.64 inputs; in 14.2 - 3.4 = 10.8 MiB they come by
7, which is 2.58 inputs and one chunk more. Of those that the operator multiplies two exist at a time, 2.3 MiB, and
leave room for 7 items at 2.53 inputs.
"""


CALL_SECONDS = 5e-4
"""What the call of an operator takes on a CPU beside its operations, 0.2 to 0.7 ms: its Python runs cold."""


remembered = lru_cache(maxsize=256)
"""The layers of a model have one shape, which is planned once. A plan depends on nothing but its arguments."""


@dataclass(frozen=True)
class Workspace:
    """Bound of an operator's scratch memory in bytes: ``max(least, per_element * elements of its input)``.

    Where products of factors exist beside it, ``max(least, min(per_element * elements, in_all * elements - beside))``.

    Attributes:
        in_all: bytes an element of input that workspace and products may take.
        beside: bytes of the products.
    """

    least: int
    per_element: Fraction = Fraction(0)
    in_all: Fraction = Fraction(0)
    beside: int = 0

    def bytes_for(self, elements: sympy.Expr) -> sympy.Expr:
        """The bound as a formula."""
        share = sympy.floor(sympy.Rational(self.per_element) * elements)
        if self.beside:
            share = memory.minimum(share, sympy.floor(sympy.Rational(self.in_all) * elements) - self.beside)
        return memory.maximum(self.least, share)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a region.

    Attributes:
        strategy: its name.
        workspace: bound of the operator's scratch memory.
        seconds: predicted time.
        transient: bytes of intermediates beside the result.
        how: half a sentence for the report.
    """

    strategy: Strategy
    workspace: Workspace
    seconds: sympy.Expr
    transient: sympy.Expr
    how: str


@dataclass(frozen=True)
class Plan:
    """How to compute a region.

    Attributes:
        strategy: the choice.
        workspace: bound of the operator's scratch memory.
        reason: one sentence for the report.
        transient_before: bytes of intermediates as the model writes the region.
        transient_after: bytes of intermediates under the plan.
        candidates: what was compared, the region as written last.
    """

    strategy: Strategy
    workspace: Workspace
    reason: str
    transient_before: sympy.Expr
    transient_after: sympy.Expr
    candidates: tuple[Candidate, ...]


@remembered
def plan_mlp(shape: MlpShape, options: Options) -> Plan:
    """Fused where the accumulators fit on chip, else streamed, merged or kept."""
    if shape.is_empty:
        return _nothing_to_compute(shape, options)
    device = device_of(shape.device)
    before = memory.mlp_as_written(shape)
    offered: list[Candidate] = []
    obstacle = _obstacle_to_fusing(shape, device)
    if obstacle is None:
        workspace = _workspace(shape, device, options, memory.SHARE_FOR_PARTIAL_SUMS)
        seconds, transient = partial(time.mlp_fused, shape, device), partial(memory.mlp_fused, shape, device)
        offered += _offer(shape, Strategy.FUSED, [workspace], seconds, transient, "the hidden layer stays on chip")

    def chunks(bound: sympy.Expr) -> sympy.Expr:
        return _at_most(memory.mlp_streamed(shape, device, bound), before)

    how = "the hidden layer passes in chunks"
    seconds = partial(time.mlp_streamed, shape, device)
    offered += _offer(shape, Strategy.STREAMED, _workspaces(shape, device, options), seconds, chunks, how)
    to_merge = _costing_more_than_dense(shape, {"out": shape.features["hidden"]})
    if to_merge:
        products, how = memory.products(shape, device, to_merge), _merging(to_merge)
        workspaces, seconds = _workspaces(shape, device, options, products), partial(time.mlp_merged, shape, device)
        offered += _offer(shape, Strategy.MERGED, workspaces, seconds, lambda bound: products + chunks(bound), how)
    obstacles = {} if obstacle is None else {Strategy.FUSED: obstacle}
    return _choice(shape, offered, time.mlp_kept(shape, device.as_written()), before, options, obstacles)


@remembered
def plan_attention(shape: AttentionShape, options: Options) -> Plan:
    """Streamed, a few items or heads lifted out of rank space at a time; or left in rank space, or merged, or kept."""
    if shape.is_empty:
        return _nothing_to_compute(shape, options)
    device = device_of(shape.device)
    before = memory.attention_as_written(shape)
    offered: list[Candidate] = []

    def chunks(lifted: AttentionShape, bound: sympy.Expr, products: int) -> sympy.Expr:
        return products + _at_most(memory.attention_streamed(lifted, device, bound), before)

    how = "q, k, v are lifted a few items or heads at a time"
    held = memory.products(shape, device)
    workspaces = _workspaces(shape, device, options, held)
    if memory.lifts_on_chip(shape, device) and memory.is_short(shape):
        workspaces = workspaces[:1]  # the least holds the rank space of short sequences
    seconds, transient = partial(time.attention_streamed, shape, device), partial(chunks, shape, products=held)
    offered += _offer(shape, Strategy.STREAMED, workspaces, seconds, transient, how)
    to_merge = _costing_more_than_dense(shape, {"out": memory.heads_width(shape)})
    if to_merge:
        held, merged = memory.products(shape, device, to_merge), shape.with_dense(to_merge)
        workspaces, transient = _workspaces(shape, device, options, held), partial(chunks, merged, products=held)
        seconds = partial(time.attention_merged, shape, device, merged=merged)
        offered += _offer(shape, Strategy.MERGED, workspaces, seconds, transient, _merging(to_merge))
    obstacles: dict[Strategy, str] = {}
    if isinstance(shape.rank_space, RankSpace):
        how = f"scores and values are taken in rank space, heads of {shape.rank_space.head_dim}"
        seconds = partial(time.attention_absorbed, shape, device)
        transient = partial(memory.attention_absorbed, shape, device)
        offered += _offer(shape, Strategy.ABSORBED, _workspaces(shape, device, options), seconds, transient, how)
    else:
        obstacles[Strategy.ABSORBED] = shape.rank_space
    if shape.shared:
        again = time.attention_shared_projections(shape, device.as_written())
        how = f"; {', '.join(shape.shared)} are computed again for what else reads them"
        offered = [replace(c, seconds=c.seconds + again, how=c.how + how) for c in offered]
    kept = time.attention_kept(shape, device.as_written())
    return _choice(shape, offered, kept, before - memory.shared(shape), options, obstacles)


@remembered
def plan_linear(shape: LinearShape, options: Options) -> Plan:
    """Streamed; merged where multiplying the factors pays off for this many rows; or kept."""
    if shape.is_empty:
        return _nothing_to_compute(shape, options)
    device = device_of(shape.device)
    before = memory.linear_as_written(shape)
    copies = shape.itemsize * memory.copied_factors(shape, "w", shape.in_features, shape.rows) if device.grows else 0
    workspaces, seconds = _workspaces(shape, device, options, copies), partial(time.linear_streamed, shape, device)
    how = "rank space passes in chunks"
    offered = _offer(shape, Strategy.STREAMED, workspaces, seconds, lambda bound: copies + _at_most(bound, before), how)
    to_merge = _costing_more_than_dense(shape, {})
    if to_merge:
        weight, how = memory.merged_weight(shape), _merging(to_merge)
        merged = Candidate(Strategy.MERGED, workspaces[0], time.linear_merged(shape, device), weight, how)
        offered.append(merged)
    return _choice(shape, offered, time.linear_kept(shape, device.as_written()), before, options)


def _offer(
    shape: RegionShape,
    strategy: Strategy,
    workspaces: list[Workspace],
    seconds: Callable[[sympy.Expr], sympy.Expr],
    transient: Callable[[sympy.Expr], sympy.Expr],
    how: str,
) -> list[Candidate]:
    """A candidate for each workspace, by what takes its bound in bytes."""
    elements = shape.input_elements
    return [
        Candidate(strategy, workspace, seconds(bound := workspace.bytes_for(elements)), transient(bound), how)
        for workspace in workspaces
    ]


def _nothing_to_compute(shape: RegionShape, options: Options) -> Plan:
    """The plan of a region without rows: the formulas would divide by their number."""
    return _choice(shape, [], sympy.S.Zero, sympy.S.Zero, options)


def _costing_more_than_dense(shape: RegionShape, inputs: dict[str, sympy.Expr | int]) -> dict[str, sympy.Expr | int]:
    """Input sizes by role of the pairs that cost more than their product; ``inputs`` has those that are not ``x``'s."""
    low_rank = [role for role, rank in shape.ranks.items() if rank is not None]
    sizes = {role: inputs.get(role, shape.in_features) for role in low_rank}
    return {role: size for role, size in sizes.items() if shape.costs_more_than_dense(role, size)}


def _merging(roles: Iterable[str]) -> str:
    return f"the factors of {', '.join(roles)} hold no fewer elements than their product"


OBSTACLES: Mapping[Strategy, str] = MappingProxyType(
    {
        Strategy.FUSED: "only MLPs have a kernel for it",
        Strategy.STREAMED: "there is nothing to compute",
        Strategy.ABSORBED: "only attention has such a form",
        Strategy.MERGED: "factors hold fewer elements than their product",
    }
)
"""Why a strategy is not offered, where a plan knows no more."""

REWRITE_ANYWAY = "options={'strategy': 'streamed'} rewrites it anyway"
"""What to do where a small region stays. Every region has the strategy."""


def _choice(
    shape: RegionShape,
    offered: list[Candidate],
    seconds: sympy.Expr,
    before: sympy.Expr,
    options: Options,
    obstacles: Mapping[Strategy, str] = MappingProxyType({}),
) -> Plan:
    """The user's candidate where there is one of that name, else the planner's.

    Args:
        offered: everything but keeping the region.
        seconds, before: time and transient memory of the region as written.
        obstacles: why a strategy is not among those offered, before :data:`OBSTACLES`.
    """
    kept = Candidate(Strategy.KEPT, Workspace(0), seconds, before, f"{shape.kind} stays as the model computes it")
    candidates = (*offered, kept)
    forced = None if options.strategy == AUTO else Strategy(options.strategy)
    named = [candidate for candidate in candidates if candidate.strategy == forced]
    if named:
        chosen = named[0]
        reason = f"{chosen.how}; strategy {forced!s} was asked for"
    else:
        gainful = [candidate for candidate in offered if not _gains_nothing(shape, candidate, kept)]
        chosen = _best(shape, gainful, kept, options.memory_budget)
        why = _comparison(shape, chosen, kept)
        if chosen is kept and len(gainful) < len(offered):
            room = offered[0].workspace.least / 2**20
            why = f"all intermediates fit in {room:.3g} MiB, where an operator would do the same; {REWRITE_ANYWAY}"
        reason = f"{chosen.how}; {why}"
        if forced is not None:
            reason += f"; {forced!s} is not offered here: {obstacles.get(forced) or OBSTACLES[forced]}"
    if options.debug:
        reason += _also_considered(shape, chosen, kept, offered)
    return Plan(chosen.strategy, chosen.workspace, reason, kept.transient, chosen.transient, candidates)


def _gains_nothing(shape: RegionShape, candidate: Candidate, kept: Candidate) -> bool:
    """Whether the operator would do what the model does, or save less than its call takes.

    On a CPU, whose workspace does not grow, an operator computes as a whole what fits. Not where sizes may grow, nor
    where gradients may be asked for: the model's own intermediates would be kept for them, those of all layers.
    """
    if device_of(shape.device).grows or shape.differentiated or not kept.transient.is_number:
        return False
    if bool(kept.transient > candidate.workspace.least):
        return False
    saved = shape.at_hints(kept.seconds - candidate.seconds) if candidate.strategy == Strategy.MERGED else 0.0
    return candidate.strategy in (Strategy.STREAMED, Strategy.MERGED) and saved < CALL_SECONDS


def _best(shape: RegionShape, offered: Iterable[Candidate], kept: Candidate, budget: int | None) -> Candidate:
    """The fastest within the budget, and of equally fast ones the smallest; the smallest where none is within it.

    Equally fast is what takes at most :data:`NOISE` longer than the fastest, and :data:`LOSS` longer than as written.
    Of a strategy's workspaces that are cut into chunks of one size, the one with the least bound.
    """
    sizes = {candidate: shape.at_hints(candidate.transient) for candidate in (*offered, kept)}
    within = [candidate for candidate, size in sizes.items() if budget is None or size <= budget]
    if not within:
        return min(sizes, key=sizes.__getitem__)
    seconds = {candidate: shape.at_hints(candidate.seconds) for candidate in within}
    least = min(seconds.values())
    longest = least + NOISE * abs(least)
    if kept in seconds:
        longest = max(least, min(longest, (1 + LOSS) * seconds[kept]))
    fast = [candidate for candidate in within if seconds[candidate] <= longest]
    best = min(fast, key=lambda candidate: (sizes[candidate], seconds[candidate]))
    alike = (candidate for candidate in fast if candidate.strategy == best.strategy)
    return next(candidate for candidate in alike if sizes[candidate] == sizes[best])  # the least bound of these chunks


def _comparison(shape: RegionShape, chosen: Candidate, kept: Candidate) -> str:
    """Predicted time against that of the region as written."""
    if chosen is kept:
        return "nothing that is offered is predicted to be as fast"
    ratio = shape.at_hints(chosen.seconds) / shape.at_hints(kept.seconds)
    equal = f", which counts as equal (within {LOSS:.0%})" if 1 < ratio <= 1 + LOSS else ""
    return f"predicted to take {ratio:.2f} of the time as written{equal}"


def _also_considered(shape: RegionShape, chosen: Candidate, kept: Candidate, offered: Iterable[Candidate]) -> str:
    """Predicted time, against that as written, and memory of each strategy that was not taken, at its fastest."""
    fastest: dict[Strategy, Candidate] = {}
    for candidate in sorted(offered, key=lambda each: shape.at_hints(each.seconds)):
        if candidate.strategy != chosen.strategy:
            fastest.setdefault(candidate.strategy, candidate)
    written = shape.at_hints(kept.seconds)
    others = [
        f"{strategy} {shape.at_hints(other.seconds) / written:.2f} of the time as written in "
        + format_bytes(round(shape.at_hints(other.transient)))
        for strategy, other in fastest.items()
    ]
    return f"; also considered: {', '.join(others)}" if others else ""


def _obstacle_to_fusing(shape: MlpShape, device: Device) -> str | None:
    """Why no kernel keeps the hidden layer on chip, if none does; float32 is left to the library."""
    if not device.max_fused_rank:
        return "only GPUs have a kernel for it"
    if shape.itemsize != 2:
        return "the kernel computes in half precision"
    if "gate" in shape.ranks:
        return "the kernel takes no gate"
    if None in shape.ranks.values():
        return "the kernel takes no dense projection"
    if max(map(shape.latent, shape.ranks)) > device.max_fused_rank:
        return f"the kernel takes ranks up to {device.max_fused_rank}"
    return None


def _workspaces(shape: RegionShape, device: Device, options: Options, products: int = 0) -> list[Workspace]:
    """Bounds to choose from, the least first, beside ``products`` bytes of multiplied factors."""
    return list(dict.fromkeys(_workspace(shape, device, options, share, products) for share in SHARES_OF_INPUT))


def _workspace(shape: RegionShape, device: Device, options: Options, share: Fraction, products: int = 0) -> Workspace:
    if options.memory_budget is not None:
        least = min(options.memory_budget, device.least_workspace)  # or a row at a time would pass
        return Workspace(max(least, options.memory_budget - products))
    if not device.grows:
        return Workspace(device.least_workspace)
    least, per_element = device.least_workspace, shape.itemsize * share
    if not products:
        return Workspace(least, per_element)
    return Workspace(least, per_element, per_element + shape.itemsize * SHARE_FOR_PRODUCTS, products)


def _at_most(bound: sympy.Expr, need: sympy.Expr) -> sympy.Expr:
    """A workspace is never larger than what there is to compute."""
    return memory.minimum(bound, need)
