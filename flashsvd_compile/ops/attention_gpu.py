"""A streamed attention region on a GPU: few launches, each large enough to fill the chip.

Queries and output are projected for all rows at once, over the memory of the result (queries of a normalised input with
its keys, where these go through the library). Keys and values are lifted straight from the input, a chunk of batch
items or a group of heads at a time, by one kernel that keeps their rank space on chip; a chunk's queries go with them
where that kernel would leave processors idle. Ranks beyond it go through the library and a rank-space intermediate in
the workspace. Short sequences are the other way round: their rank space is in the workspace, and the attention kernel
lifts it where it uses it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import attention as attention_kernel
from ..kernels import projection as projection_kernel
from ..kernels import rotary as rotary_kernel
from ..kernels import short_attention as short_kernel
from ..kernels import small_products
from ..kernels.launch import SECOND_AXIS
from ..kernels.operands import Product, begin_alike
from ..kernels.product import multiply
from ..kernels.target import speaks_gluon, target_of
from ..kernels.tiles import aligned_columns
from . import merging, norm
from . import projection as proj
from .aligned import with_aligned_rank
from .attention_region import Attention
from .lifting import (
    Lift,
    into_rank_space,
    is_fused,
    lifter,
    lifter_of,
    lifter_of_both,
    map_of,
    rotate_,
    rotation_of,
)
from .projection import Projection
from .ranges import ranges, width_of
from .replay import as_one
from .residual import plus
from .sdpa import attend_at_once, is_causal
from .workspace import Workspace, affines_into, elements_per_row, project_rows, rows_of, rows_that_fit


def supported(x: Tensor, attn: Attention) -> bool:
    """Whether :func:`streamed` computes the region: what the kernel attends to, heads of the result's width."""
    return attn.queries_in_place and attn.heads_in_place and attends(x, attn)


def attends(x: Tensor, attn: Attention) -> bool:
    """Whether our own kernel attends: no mask, documents, norm or cap, a head that it has tiles for, scale > 0."""
    unmasked = attn.mask is None and attn.documents is None
    plain = unmasked and not attn.normed and not attn.softcap and attn.scale > 0 and x.numel() > 0
    return plain and attention_kernel.supported(attn.head_dim, attn.value_dim, x.dtype, x.device)


def kernel_core(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention, bounds: Tensor | None = None) -> None:
    """A :data:`~.sdpa.Core` by our own kernel, for regions that :func:`attends` accepts."""
    if bounds is None and attn.key_padding is not None:
        bounds = attention_kernel.key_bounds(attn.key_padding)
    attention_kernel.attention(
        q,
        k,
        v,
        out,
        key_padding=attn.key_padding,
        bounds=bounds,
        scale=attn.scale,
        window_left=attn.window_left,
        window_right=attn.window_right,
    )


def streamed(
    x: Tensor,
    context: Tensor,
    attn: Attention,
    workspace_bytes: int,
    residual: Tensor | None = None,
    merges: bool = False,
) -> Tensor:
    """The region's result plus the residual, which is contiguous; besides it only one workspace exists.

    See :func:`supported`. A norm of the input is held as a whole, except where :func:`_after_norm` has the region. With
    ``merges`` factors that cost more than their product are multiplied when they are used, and the product is forgotten
    after that.
    """
    elements = workspace_bytes // x.element_size()
    if attn.cos is not None and attn.sin is not None:  # copied once, not for each chunk
        adjacent = rotary_kernel.with_adjacent_features
        attn = attn._replace(cos=adjacent(attn.cos), sin=adjacent(attn.sin))
    if attn.x_norm is not None:
        low_rank = all(p.down is not None for p in (attn.q, attn.k, attn.v))
        if low_rank and not merges and not is_fused(x, attn.k, attn.v):
            return _after_norm(x, attn, elements, residual)
        x = context = norm.of_rows(x, attn.x_norm)
    result = x.new_empty(*x.shape[:2], attn.out_features)
    heads, short = result.unflatten(-1, (attn.num_heads, attn.head_dim)), _is_short(x.shape[1], context, attn)
    if merges:
        _attend_merged(heads, x, context, attn, elements)
        attn = attn._replace(out=attn.out and proj.merge_if_cheaper(attn.out))
    elif short and is_fused(x, attn.q):
        _attend_to_short(heads, context, attn, elements, x=x)
    else:
        together = context is x and not short and _come_together(x, attn, elements)
        if not together:
            _project(rows_of(result), rows_of(x), attn.q, elements)
            rotate_(heads, attn)
        _attend_by_chunks(heads, context, attn, elements, together=together)
    return _out_of(result, attn.out, elements, residual)


def _attend_merged(heads: Tensor, x: Tensor, context: Tensor, attn: Attention, elements: int) -> None:
    """Attention into ``heads[batch, q_len, heads, head_dim]``, with factors multiplied that cost more than that."""
    lifted = attn._replace(k=attn.k._replace(down=None), v=attn.v._replace(down=None))  # without rank space
    room = _chunking(heads.shape[1], context, lifted, elements).elements
    queries, others = merging.for_queries(attn, room)
    _project(rows_of(heads.flatten(2)), rows_of(x), queries, elements)
    del queries
    rotate_(heads, attn)
    k, v, both = others or merging.for_keys_and_values(attn)
    _attend_by_chunks(heads, context, attn._replace(k=k, v=v), elements, both=both)


def _out_of(result: Tensor, projection: Projection[Tensor] | None, elements: int, residual: Tensor | None) -> Tensor:
    """Attention's outputs ``[batch, q_len, features]`` projected in place, plus the residual."""
    if projection is None:
        return plus(result, residual)
    rows, added = rows_of(result), None if residual is None else rows_of(residual)
    _project(rows, rows, projection, elements, residual=added)
    return result


def _come_together(x: Tensor, attn: Attention, elements: int) -> bool:
    """Whether one launch projects a chunk's queries with its keys and values, for self-attention."""
    length, three = x.shape[1], (attn.q, attn.k, attn.v)
    if not is_fused(x, *three):
        return False
    chunk = _chunking(length, x, attn, elements)
    ranks, widths = [proj.rank(p) for p in three], [proj.out_features(p) for p in three]
    enough = projection_kernel.takes_three(chunk.items * length, ranks, widths, x.dtype, x.device)
    return enough and chunk.kv_heads == attn.num_kv_heads


def _attend_by_chunks(
    heads: Tensor,
    context: Tensor,
    attn: Attention,
    elements: int,
    together: bool = False,
    both: Projection[Tensor] | None = None,
) -> None:
    """Attention of ``heads[batch, q_len, heads, head_dim]`` in place, keys and values out of ``context``.

    Args:
        together: the queries, which are to go there, too.
        both: the projections of keys and values as one, if there is one.
    """
    batch, q_len = heads.shape[:2]
    if _is_short(q_len, context, attn):
        return _attend_to_short(heads, context, attn, elements)
    if not is_fused(context, attn.k, attn.v):
        attn = _with_aligned_ranks(attn, context, "k", "v")
    chunk = _chunking(q_len, context, attn, elements)
    whole = attn.cos is None and chunk.kv_heads == attn.num_kv_heads
    both = both or merging.side_by_side(attn) if whole else None
    workspace = Workspace(chunk.elements, like=heads, aligned=2)
    for items, part, bounds in _parts(attn, batch, chunk.items, _key_bounds(attn, chunk)):
        workspace.reset()
        if both is not None:
            lift = lifter_of_both(context[items], both, part, workspace)
        else:
            queries = heads[items] if together else None
            lift = lifter(context[items], part, workspace, queries, follows=items.start > 0 or not together)
        _attend_by_groups(heads[items], lift, part, chunk, workspace, bounds)


def _after_norm(x: Tensor, attn: Attention, elements: int, residual: Tensor | None) -> Tensor:
    """As :func:`streamed`, for self-attention of a normalised input whose rank space passes through memory.

    Some rows at a time are normalised, projected and forgotten, in the room that keys and values take afterwards.
    """
    result = x.new_empty(*x.shape[:2], attn.out_features)
    heads = result.unflatten(-1, (attn.num_heads, attn.head_dim))
    out, attn = attn.out, _with_aligned_ranks(attn, x, "q", "k", "v")
    chunk = _chunking(x.shape[1], x, attn, elements)
    for items, part, bounds in _parts(attn, x.shape[0], chunk.items, _key_bounds(attn, chunk)):
        room = chunk.elements + chunk.passing
        latents = _queries_and_rank_space(heads[items], x[items], part, room)
        workspace = Workspace(chunk.elements - sum(map(Tensor.numel, latents)), like=x, aligned=2)
        lift = lifter_of(latents, heads[items].shape[0], part, workspace)
        _attend_by_groups(heads[items], lift, part, chunk, workspace, bounds)
        del latents, lift, workspace, part
    del attn
    return _out_of(result, out, elements, residual)


def _with_aligned_ranks(attn: Attention, x: Tensor, *roles: str) -> Attention:
    """The region with some projections of ``x[batch, len, in_features]`` as the library multiplies them fast."""
    rows = x.shape[0] * x.shape[1]
    return attn._replace(**{role: with_aligned_rank(getattr(attn, role), rows) for role in roles})


def _parts(
    attn: Attention, batch: int, count: int, bounds: Tensor | None = None
) -> Iterator[tuple[slice, Attention, Tensor | None]]:
    """``count`` batch items at a time, with the region and the bounds of visible keys restricted to them."""
    for items in ranges(batch, count):
        yield items, attn.of_items(items), None if bounds is None else bounds[items]


def _key_bounds(attn: Attention, chunk: "_Chunk") -> Tensor | None:
    """Where each item's visible keys are, for our own kernel."""
    if attn.key_padding is None or chunk.passing:
        return None
    return attention_kernel.key_bounds(attn.key_padding)


def _queries_and_rank_space(heads: Tensor, x: Tensor, attn: Attention, elements: int) -> list[Tensor]:
    """Fill ``heads[items, len, heads, head_dim]`` with rotated queries; the rank space of keys and of values,
    ``[items * len, rank]`` each.

    Args:
        x: not normalised yet, ``[items, len, in_features]``.
        elements: of memory that normalised rows and rank space may take.
    """
    queries, rows = rows_of(heads.flatten(2)), rows_of(x)
    of_keys, of_values = (rows.new_empty(len(rows), proj.rank(projection)) for projection in (attn.k, attn.v))
    left, per_row = elements - of_keys.numel() - of_values.numel(), rows.shape[1] + proj.rank(attn.q)
    step = rows_that_fit(left, per_row, len(rows))
    of_queries = rows.new_empty(step, proj.rank(attn.q))
    rotation = rotation_of(Product(of_queries, attn.q.up, attn.q.up_bias, queries[:step]), len(rows), attn)

    def project(some: slice, normalised: Tensor) -> None:
        into = (of_keys[some], of_values[some], of_queries[: len(normalised)])
        keys, values, latent = map(into_rank_space, (normalised,) * 3, (attn.k, attn.v, attn.q), into)
        affines_into(keys, values)
        affines_into(latent)
        lifting = Product(latent.out, attn.q.up, attn.q.up_bias, queries[some])
        if rotation is None:
            affines_into(lifting)
        else:
            multiply(lifting, rotation=rotation._replace(first=some.start))

    for some in ranges(len(rows), step):
        project(some, norm.of_rows(rows[some], attn.x_norm))
    if rotation is None:
        rotate_(heads, attn)
    return [of_keys, of_values]


def _attend_by_groups(
    heads: Tensor, lift: Lift, attn: Attention, chunk: "_Chunk", workspace: Workspace, bounds: Tensor | None
) -> None:
    """Attention of ``heads[items, q_len, heads, head_dim]``, ``chunk.kv_heads`` key heads at a time, in place."""
    mark = workspace.mark()
    for of_keys in ranges(attn.num_kv_heads, chunk.kv_heads):
        workspace.reset(mark)
        k, v = lift(of_keys.start, width_of(of_keys))
        group = heads[:, :, of_keys.start * attn.group : of_keys.stop * attn.group]
        _attend(group, k, v, attn, bounds)


def _attend(heads: Tensor, k: Tensor, v: Tensor, attn: Attention, bounds: Tensor | None) -> None:
    """Attention of lifted heads, ``[items, len, heads, dim]`` each; the outputs replace the queries in ``heads``."""
    if _library_is_faster(heads.shape[1], k, attn):
        mask = None if attn.key_padding is None else attn.key_padding[:, None, None]
        outputs = as_one(_by_library, heads, k, v, attn.scale, mask, is_causal(attn))
        if attn.key_padding is None:
            heads.copy_(outputs)
        else:  # the library does not say what a query gives that sees no key
            torch.where(attn.key_padding.any(1)[:, None, None, None], outputs, outputs.new_zeros(()), out=heads)
        return
    kernel_core(heads, heads, k, v, attn, bounds)


def _by_library(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    with sdpa_kernel(_SINGLE if k.dtype == torch.float32 else _HALF, set_priority=True):
        return attend_at_once(q, k, v, scale, mask, is_causal)


_SINGLE = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_HALF = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def _library_is_faster(q_len: int, context: Tensor, attn: Attention) -> bool:
    """Whether the library attends, whose kernels need room for their outputs beside keys and values.

    Plain causal attention of wide heads: cuDNN is 33 % ahead of our kernel at 16384 keys (sm_90), and 14 % at 4096
    with all heads at once, but not with as few as pass through the workspace; not of the kernel in Gluon, which takes
    them where it can.

    float32 where our kernel does not use tensor cores: it takes 4.6 ms where the library's memory-efficient kernel,
    which does, takes 0.9 (32x512 of 12 heads, H100). A window, or padding of causal attention, that would want as a
    dense mask.
    """
    if attn.group > 1 or attn.head_dim != attn.value_dim or q_len != context.shape[1]:
        return False
    causal, padded = is_causal(attn), attn.key_padding is not None
    if context.dtype == torch.float32:
        if attention_kernel.triples(target_of(context.device), attn.head_dim):
            return False
        return attn.head_dim % 4 == 0 and (not attn.windowed or (causal and not padded)) and not torch.version.hip
    if not causal or padded or attn.head_dim != 128 or context.shape[1] < 8192:
        return False
    target = target_of(context.device)
    return target.name == "sm_90" and not speaks_gluon(target)


class _Chunk(NamedTuple):
    """Batch items and key heads lifted at a time, and the elements that takes.

    Attributes:
        elements: of the workspace.
        passing: of outputs that the library returns, beside the workspace.
    """

    items: int
    kv_heads: int
    elements: int
    passing: int = 0


def _chunking(q_len: int, context: Tensor, attn: Attention, elements: int) -> _Chunk:
    """The largest chunk that fits: whole items if one fits, else head groups of one item, at least one group."""
    batch, kv_len, _ = context.shape
    latent = 0 if is_fused(context, attn.k, attn.v) else kv_len * (proj.rank(attn.k) + proj.rank(attn.v))
    lifted = kv_len * (attn.head_dim + attn.value_dim)
    passing = q_len * attn.value_dim if _library_is_faster(q_len, context, attn) else 0
    item = latent + attn.num_kv_heads * (lifted + passing)
    items, kv_heads = 1, attn.num_kv_heads
    if item <= elements:
        items = rows_that_fit(elements, item, batch)
    else:
        kv_heads = rows_that_fit(elements - latent, lifted + passing, attn.num_kv_heads)
    return _Chunk(items, kv_heads, items * (latent + kv_heads * lifted), items * kv_heads * passing)


def _is_short(q_len: int, context: Tensor, attn: Attention) -> bool:
    """Whether the kernel for short sequences takes the region."""
    kv_len, ranks = context.shape[1], (proj.rank(attn.k), proj.rank(attn.v))
    how = q_len, kv_len, attn.head_dim, ranks, context.dtype, context.device
    return attn.cos is None and short_kernel.supported(*how)


def _short_chunking(context: Tensor, attn: Attention, elements: int) -> _Chunk:
    """As :func:`_chunking`, for items whose keys and values stay in rank space."""
    batch, kv_len, _ = context.shape
    item = kv_len * (aligned_columns(proj.rank(attn.k)) + aligned_columns(proj.rank(attn.v)))
    items = min(rows_that_fit(elements, item, batch), max(1, SECOND_AXIS // attn.num_heads))
    return _Chunk(items, attn.num_kv_heads, items * item)


def _attend_to_short(heads: Tensor, context: Tensor, attn: Attention, elements: int, x: Tensor | None = None) -> None:
    """Attention of short items; the outputs replace the queries in ``heads[batch, q_len, heads, dim]``.

    ``x``: what all queries come from, if they are not there yet. They are projected while the first items' rank space
    still is, as neither leaves a processor full.
    """
    chunk = _short_chunking(context, attn, elements)
    workspace = Workspace(chunk.elements, like=heads)
    for items, part, _ in _parts(attn, len(heads), chunk.items):
        workspace.reset()
        keys, values = _short_rank_space(rows_of(context[items]), attn, workspace)
        if x is not None and items.start == 0:
            rows = rows_of(x)
            _project(rows_of(heads.flatten(2)), rows, attn.q, elements, ahead=begin_alike(rows, x))
        short_kernel.short_attention(
            heads[items],
            keys,
            values,
            heads[items],
            key_padding=part.key_padding,
            kv_heads=attn.num_kv_heads,
            scale=attn.scale,
            window_left=attn.window_left,
            window_right=attn.window_right,
        )


def _short_rank_space(rows: Tensor, attn: Attention, workspace: Workspace) -> list[short_kernel.Factors]:
    """Keys and values of these rows, in rank space."""
    products, factors, projections = [], [], [attn.k, attn.v]
    if not small_products.faster(*((rows, p.down) for p in projections if p.down is not None)):
        projections = [with_aligned_rank(projection, len(rows)) for projection in projections]
    for projection in projections:
        latent = workspace.take(len(rows), aligned_columns(proj.rank(projection)))[:, : proj.rank(projection)]
        products.append(into_rank_space(rows, projection, latent))
        factors.append(short_kernel.Factors(latent, projection.up, projection.up_bias))
    affines_into(*products)
    return factors


def _project(
    out: Tensor,
    x: Tensor,
    projection: Projection[Tensor],
    elements: int,
    residual: Tensor | None = None,
    ahead: bool = False,
) -> None:
    """``out[rows, features] = projection(x) + residual`` through that many elements of scratch.

    ``out`` may be ``x`` itself. ``ahead``: the launch before writes nothing that the projection reads.
    """
    if is_fused(x, projection):
        projection_kernel.project(x, map_of(projection, slice(None), out), ahead=ahead)
        plus(out, residual)
        return
    projection = with_aligned_rank(projection, len(x))
    per_row = elements_per_row(out, x, projection)
    project_rows(out, x, projection, Workspace(max(per_row, min(elements, len(x) * per_row)), like=x), residual)
