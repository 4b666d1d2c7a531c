"""The strategy for a region: the fastest one within the least memory."""

from dataclasses import dataclass

import sympy

from ..options import AUTO, Options, Strategy
from . import memory
from .device import Device, device_of
from .shapes import AttentionShape, LinearShape, MlpShape, RegionShape


@dataclass(frozen=True)
class Workspace:
    """Bound of an operator's scratch memory: ``max(least, per_element * elements of its input)`` bytes."""

    least: int
    per_element: int = 0

    def bytes_for(self, elements: sympy.Expr) -> sympy.Expr:
        """The bound as a formula."""
        return sympy.Max(self.least, self.per_element * elements)


@dataclass(frozen=True)
class Plan:
    """How to compute a region.

    Attributes:
        strategy: the choice.
        workspace: bound of the operator's scratch memory.
        reason: one sentence for the report.
        transient_before: bytes of intermediates as the model writes the region.
        transient_after: bytes of intermediates under the plan.
    """

    strategy: Strategy
    workspace: Workspace
    reason: str
    transient_before: sympy.Expr
    transient_after: sympy.Expr


def plan_mlp(shape: MlpShape, options: Options) -> Plan:
    """Fused where the accumulators fit on chip, streamed otherwise."""
    device = device_of(shape.device)
    before = memory.mlp_as_written(shape)
    if _on_chip(shape, device) and "gate" not in shape.ranks:
        strategy = Strategy.FUSED
        reason = f"ranks up to {max(map(shape.latent, shape.ranks))} fit the on-chip accumulators"
    else:
        strategy, reason = Strategy.STREAMED, "rows in chunks, the hidden tensor stays in the workspace"
    strategy, reason = _forced(strategy, reason, options, (Strategy.FUSED, Strategy.STREAMED, Strategy.MERGED))
    workspace = _workspace(shape, device, options, on_chip=strategy == Strategy.FUSED)
    after = memory.mlp_fused(shape) if strategy == Strategy.FUSED else workspace.bytes_for(shape.input_elements)
    return Plan(strategy, workspace, reason, before, _at_most(after, before))


def plan_attention(shape: AttentionShape, options: Options) -> Plan:
    """Streamed: a few items or heads are lifted out of rank space at a time."""
    device = device_of(shape.device)
    before = memory.attention_as_written(shape)
    strategy, reason = Strategy.STREAMED, "q, k, v are lifted a few items or heads at a time"
    strategy, reason = _forced(strategy, reason, options, (Strategy.STREAMED, Strategy.MERGED))
    workspace = _workspace(shape, device, options, on_chip=_on_chip(shape, device))
    after = memory.attention_streamed(shape, workspace.bytes_for(shape.input_elements))
    return Plan(strategy, workspace, reason, before, _at_most(after, before))


def plan_linear(shape: LinearShape, options: Options) -> Plan:
    """Streamed while the factors hold fewer elements than their product, merged otherwise."""
    device = device_of(shape.device)
    workspace = _workspace(shape, device, options, on_chip=False)
    before = memory.linear_as_written(shape)
    rank, features = shape.latent("w"), shape.features["w"]
    if rank * (shape.in_features + features) >= shape.in_features * features:
        strategy, reason = Strategy.MERGED, "the factors hold no fewer elements than their product"
    else:
        strategy, reason = Strategy.STREAMED, "the rank-space intermediate stays in cache"
    strategy, reason = _forced(strategy, reason, options, (Strategy.STREAMED, Strategy.MERGED))
    merged_bytes = shape.itemsize * shape.in_features * features
    after = merged_bytes if strategy == Strategy.MERGED else workspace.bytes_for(shape.input_elements)
    return Plan(strategy, workspace, reason, before, after if strategy == Strategy.MERGED else _at_most(after, before))


def _on_chip(shape: RegionShape, device: Device) -> bool:
    """Whether kernels keep the rank space of every projection on chip; float32 is left to the library."""
    low_rank = all(rank is not None and rank <= device.max_fused_rank for rank in shape.ranks.values())
    return low_rank and shape.itemsize == 2


def _workspace(shape: RegionShape, device: Device, options: Options, on_chip: bool) -> Workspace:
    if options.memory_budget is not None:
        return Workspace(options.memory_budget)
    if not device.grows:
        return Workspace(device.least_workspace)
    return Workspace(device.least_workspace, shape.itemsize // 2 if on_chip else shape.itemsize)


def _forced(strategy: Strategy, reason: str, options: Options, offered: tuple[Strategy, ...]) -> tuple[Strategy, str]:
    """The user's choice where the region offers it."""
    if options.strategy == AUTO:
        return strategy, reason
    wanted = Strategy(options.strategy)
    if wanted == Strategy.KEPT or wanted in offered:
        return wanted, f"strategy {wanted!s} was asked for"
    return strategy, f"{reason}; {wanted!s} is not offered here"


def _at_most(bound: sympy.Expr, need: sympy.Expr) -> sympy.Expr:
    """A workspace is never larger than what there is to compute."""
    return sympy.Min(bound, need)
