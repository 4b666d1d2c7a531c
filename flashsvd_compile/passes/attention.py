"""Rule: attention with at least one low-rank projection becomes one operator call.

Before::

    q = linear(linear(x, q_down), q_up, q_bias).view(b, l, h, d).transpose(1, 2)    # k and v likewise
    heads = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = linear(linear(heads.transpose(1, 2).reshape(b, l, h * d), out_down), out_up, out_bias)

After::

    y = flashsvd.attention_v5(x=x, q_down=..., ..., num_heads=h, num_kv_heads=h, scale=1 / sqrt(d))

The output projection joins in when the heads go nowhere else. Queries, keys and values may: what fills a cache, or is
of one projection with a gate, stays in the graph, and the operator computes its own again, a chunk at a time, where
that is planned to be faster.

Between projection and scores queries and keys may be normalised, then rotated, then scaled; where they are neither of
the first two, ``absorbed.py`` has another form.
"""

from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch.fx import Node

from .. import ops
from ..ops.norm import argument_names
from ..planner import AttentionShape, RankSpace, plan_attention
from .absorbed import absorb, rank_space
from .affine import Affine, read_affine
from .ancestors import ancestors
from .axes import extent, named
from .concatenation import read_merges, read_out
from .factored import Factored, Obstacle, unsupported
from .factors import read_pair
from .heads import Member, read_member
from .masking import Scores, mask_arguments, why_tensors_stay
from .masks import ReadMask
from .norms import Norm, source_of_norm
from .per_head import multiply_together
from .region import Deferred, Region, present, sizes_of
from .rope import Table
from .scores import Core, read_core
from .values import example, example_shape, shape_of
from .vocabulary import read
from .weights import Weight

_NEIGHBOURHOOD = 200
_PARTS = {"getitem", "split", "chunk", "narrow", "slice"}
"""How a latent is told apart from what else its projection computes."""


def read_attention(node: Node, read_mask: ReadMask) -> Region | Obstacle | None:
    """The attention whose core's result is ``node``; an obstacle only where something low-rank leads to it."""
    found = _read_region(node, read_mask)
    return None if isinstance(found, Obstacle) and not _near_low_rank(node) else found


def _near_low_rank(node: Node) -> bool:
    """Whether the first projections met on the way back from ``node`` include a pair of factors."""
    near = islice(ancestors([node], through=lambda above: read_affine(above) is None), _NEIGHBOURHOOD)
    projections = ((above, affine) for above in near if (affine := read_affine(above)) is not None)
    return any(read_pair(above) is not None or _is_normed_pair(affine) for above, affine in projections)


def _is_normed_pair(outer: Affine) -> bool:
    """Whether a norm stands between two factors, as in multi-head latent attention: no map of low rank, but near."""
    latent = source_of_norm(outer.source)
    out_features, rank = outer.weight.shape
    while latent is not None:
        inner = read_affine(latent)
        if inner is not None:
            return rank < min(inner.weight.shape[1], out_features)
        call = read(latent)
        latent = call.input if call is not None and call.op in _PARTS else None
    return False


def _read_region(node: Node, read_mask: ReadMask) -> Region | Obstacle | None:
    core = read_core(node)
    if not isinstance(core, Core):
        return core
    q, k, v = found = [read_member(operand, core.dtype) for operand in (core.q, core.k, core.v)]
    if q is None or k is None or v is None:
        missing = " and ".join(name for name, member in zip("qkv", found, strict=True) if member is None)
        return unsupported(f"{missing} of {node.name!r} cannot be followed to a projection of [batch, len, features]")
    merges = read_merges(core)
    if not merges:
        return unsupported(f"the heads of {node.name!r} are not concatenated to [batch, len, features]")
    out, output, out_nodes = read_out(core, merges)
    of_queries, of_keys, of_values = multiply_together([q.factored, k.factored, v.factored])
    members = present(q=of_queries, k=of_keys, v=of_values, out=out)
    if not any(member.rank is not None for member in members.values()):
        return None
    obstacle = _mismatch(core, q, k, v)
    if obstacle is not None:
        return obstacle
    nodes = (*q.nodes, *k.nodes, *v.nodes, *core.nodes, *out_nodes)
    shared = _shared(q, k, v, nodes)
    inputs = {"x": q.factored.source}
    if k.factored.source is not q.factored.source:
        inputs["context"] = k.factored.source
    constants = _constants(core, q, k, read_mask)
    if isinstance(constants, Obstacle):
        return constants
    space = rank_space(q, k, v, out)
    return Region(
        kind="attention",
        operator=ops.attention,
        inputs=inputs,
        members=members,
        constants=constants,
        nodes=tuple(dict.fromkeys(nodes)),
        plan=partial(plan_attention, _shape(q, k, members, core, constants, space, shared)),
        output=output,
        absorb=partial(absorb, space) if isinstance(space, RankSpace) else None,
        note=why_tensors_stay(core.masks, read_mask) if "mask" in constants else "",
        shared=frozenset(chain(*shared.values())),
    )


def _shared(q: Member, k: Member, v: Member, nodes: tuple[Node, ...]) -> dict[str, list[Node]]:
    """Nodes of queries, keys and values that something outside of the region's reads, by role.

    A role has none where it comes out of one projection with what stays.
    """
    inside, members = set(nodes), {"q": q, "k": k, "v": v}
    read = {role: [n for n in member.nodes if not inside.issuperset(n.users)] for role, member in members.items()}
    stay = {node for role, member in members.items() if read[role] for node in member.factored.nodes}
    return {role: found for role, found in read.items() if found or not stay.isdisjoint(members[role].factored.nodes)}


def _mismatch(core: Core, q: Member, k: Member, v: Member) -> Obstacle | None:
    node = core.result.node
    if k.factored.source is not v.factored.source:
        return unsupported(f"keys and values of {node.name!r} are projections of different tensors")
    if extent(named(core.q.layout, "head")) != q.heads:
        return unsupported(f"several heads of queries of {node.name!r} are one head of their projection")
    if k.heads != v.heads or q.heads % k.heads:
        return unsupported(f"{node.name!r} has {q.heads} query, {k.heads} key and {v.heads} value heads")
    if (shape_of(q.factored.source) or ())[:1] != (shape_of(k.factored.source) or ())[:1]:
        return unsupported(f"queries and keys of {node.name!r} are of different batches")
    if v.rope is not None or v.norm is not None or v.scale != 1.0:
        return unsupported(f"the values of {node.name!r} are scaled, normed or rotated")
    if _rotation(q) != _rotation(k):
        return unsupported(f"queries and keys of {node.name!r} are rotated differently")
    return None


def _rotation(member: Member) -> tuple[Table, Table, bool] | None:
    rope = member.rope
    return None if rope is None else (rope.cos, rope.sin, rope.interleaved)


def _constants(core: Core, q: Member, k: Member, read_mask: ReadMask) -> dict[str, Any] | Obstacle:
    constants: dict[str, Any] = {
        "num_heads": q.heads,
        "num_kv_heads": k.heads,
        "scale": core.scale * q.scale * k.scale,
        "softcap": core.softcap,
    }
    if q.rope is not None:
        constants |= {"cos": _table(q.rope.cos), "sin": _table(q.rope.sin), "interleaved": q.rope.interleaved}
    constants |= _norm("q", q.norm) | _norm("k", k.norm)
    if core.causal:
        constants["window_right"] = 0
    masks = mask_arguments(core.masks, _scores(core, q), read_mask)
    return masks if isinstance(masks, Obstacle) else constants | masks


def _norm(role: str, norm: Norm | None) -> dict[str, Any]:
    """A norm by the operator's names."""
    if norm is None:
        return {}
    described = (norm.kind, norm.weight, norm.bias, norm.eps, norm.whole)
    return dict(zip(argument_names(role), described, strict=True))


def _scores(core: Core, q: Member) -> Scores:
    queries, x = example(core.q.node), example(q.factored.source)
    square = extent(named(core.q.layout, "query")) == extent(named(core.k.layout, "key"))
    wide = (x.dtype, q.factored.projection.up.value.dtype, queries.dtype)
    autocast = torch.float32 in wide and core.dtype != torch.float32
    is_sdpa = len(core.nodes) == 1
    return Scores(q.factored.source, core.dtype, square, casts_mask=autocast and is_sdpa)


def _table(table: Table) -> Deferred:
    return Deferred(table.build, (table.node,))


def _shape(
    q: Member,
    k: Member,
    members: dict[str, Factored],
    core: Core,
    constants: dict[str, Any],
    space: RankSpace | str,
    shared: dict[str, list[Node]],
) -> AttentionShape:
    queries, keys = example_shape(q.factored.source), example_shape(k.factored.source)
    return AttentionShape(
        **sizes_of(q.factored.source, members, k.factored.source),
        batch=queries[0],
        q_len=queries[1],
        kv_len=keys[1],
        num_heads=q.heads,
        num_kv_heads=k.heads,
        masked=bool(core.masks),
        causal=constants.get("window_right") == 0,
        rank_space=space,
        shared=tuple(role for role in "qkv" if role in shared),
        products=sum(weight.value.numel() for weight in _matrices(members) if weight.is_materialised),
    )


def _matrices(members: dict[str, Factored]) -> list[Weight]:
    """Both factors of each projection, or its one matrix."""
    factors = [(member.projection.down, member.projection.up) for member in members.values()]
    return [weight for weight in chain(*factors) if weight is not None]
