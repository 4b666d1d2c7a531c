"""A long attention region on a CPU: the heads' outputs go into the rank space of the output projection at once.

    y = out.up(sum over heads of heads[h] @ out.down[:, h].T)

The concatenated heads never exist, so that the result's memory has room for all of the rank space until the last
product: of queries, keys and values, and the sums. The workspace is left to the heads that are attended to. Sums are
added to in the region's dtype, float32 at least.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import norm
from . import projection as proj
from .attention_region import Attention, rotate_
from .projection import Projection
from .ranges import ranges
from .sdpa import Core, passing_elements
from .workspace import Workspace, add_product, affine_into, lift_heads, rows_that_fit

LIBRARY_TILE = 256 * 512
"""Scores that the library's kernel holds for each thread, beside as many rows of outputs."""


def supported(x: Tensor, context: Tensor, attn: Attention) -> bool:
    """Self-attention or alike, low-rank throughout, whose rank space fits in the result; heads of one size."""
    projections = (attn.q, attn.k, attn.v, attn.out)
    if x.element_size() < 4 or x.shape[:2] != context.shape[:2] or not attn.queries_in_place or attn.normed:
        return False
    return rank_space_fits(projections, attn.out_features)


def rank_space_fits(projections: Iterable[Projection[Tensor] | None], features: int) -> bool:
    """Whether all of the projections are low-rank, and their ranks no more than the features together."""
    ranks = [0 if projection is None else proj.rank(projection) for projection in projections]
    return all(ranks) and sum(ranks) <= features


def streamed(x: Tensor, context: Tensor, attn: Attention, workspace_bytes: int, core: Core) -> Tensor:
    """The region's ``[batch, len, out_features]``, an item at a time. See :func:`supported`."""
    result = x.new_empty(*x.shape[:2], attn.out_features)
    elements = workspace_bytes // x.element_size()
    for item in range(x.shape[0]):
        _one_item(result[item], x[item], context[item], attn.of_items(slice(item, item + 1)), elements, core)
    return result


def _one_item(out: Tensor, x: Tensor, context: Tensor, attn: Attention, elements: int, core: Core) -> None:
    """Fill ``out[len, out_features]``."""
    assert attn.out is not None and attn.out.down is not None
    *latents, sums = columns(out, [proj.rank(p) for p in (attn.q, attn.k, attn.v, attn.out)])
    into_rank_space(latents, x, context, attn, elements)
    kv_heads = _heads_that_fit(attn, len(x), elements)
    workspace = Workspace(needed(attn, len(x), elements), like=x, aligned=3)
    for of_keys in ranges(attn.num_kv_heads, kv_heads):
        workspace.reset()
        heads = _attend(latents, attn, of_keys, workspace, core)
        width = attn.group * attn.value_dim
        down = attn.out.down[:, of_keys.start * width : of_keys.stop * width]
        if of_keys.start == 0:
            affine_into(sums, heads, down, attn.out.down_bias)
        else:
            add_product(sums, heads, down)
    workspace.reset()
    total = workspace.take(*sums.shape).copy_(sums)  # out of the way of the result
    affine_into(out, total, attn.out.up, attn.out.up_bias)


def needed(attn: Attention, length: int, elements: int) -> int:
    """Elements that :func:`streamed` takes where it may have so many: one head of keys and values at least."""
    assert attn.out is not None
    heads = _heads_that_fit(attn, length, elements) * _elements_of_a_head(attn, length)
    return max(heads, length * proj.rank(attn.out))


def _elements_of_a_head(attn: Attention, length: int) -> int:
    """One head of keys and of values, and the queries that share them."""
    return length * ((attn.group + 1) * attn.head_dim + attn.value_dim)


def _heads_that_fit(attn: Attention, length: int, elements: int) -> int:
    """Heads of keys at a time: what the core allocates by itself counts, too."""
    rotating = 0 if attn.cos is None else length * attn.group * attn.cos.shape[-1] // 2
    passing = passing_elements(length, attn.num_heads, attn.value_dim, causal=attn.window_right == 0)
    library = torch.get_num_threads() * LIBRARY_TILE
    left = elements - max(0, passing + library - rotating)  # heads are rotated before any are attended to
    return rows_that_fit(left, _elements_of_a_head(attn, length) + rotating, attn.num_kv_heads)


def columns(rows: Tensor, widths: list[int]) -> list[Tensor]:
    """Columns of a matrix side by side."""
    return list(rows[:, : sum(widths)].split(widths, dim=1))


def into_rank_space(latents: list[Tensor], x: Tensor, context: Tensor, attn: Attention, elements: int) -> None:
    """Fill ``latents[rows, rank]`` of queries, keys and values; a norm exists for some rows at a time."""
    step = rows_that_fit(elements, 0 if attn.x_norm is None else x.shape[1], len(x))
    for rows in ranges(len(x), step):
        queried = norm.of_rows(x[rows], attn.x_norm)
        seen = context[rows] if attn.x_norm is None else queried
        for latent, source, projection in zip(latents, (queried, seen, seen), (attn.q, attn.k, attn.v), strict=True):
            assert projection.down is not None
            affine_into(latent[rows], source, projection.down, projection.down_bias)


def _attend(latents: list[Tensor], attn: Attention, of_keys: slice, workspace: Workspace, core: Core) -> Tensor:
    """Outputs ``[rows, heads * value_dim]`` of the queries that share some heads of keys."""
    count = of_keys.stop - of_keys.start
    of_queries = slice(of_keys.start * attn.group, of_keys.stop * attn.group)
    q_latent, k_latent, v_latent = (latent[None] for latent in latents)
    q = lift_heads(q_latent, attn.q, of_queries.start, count * attn.group, attn.head_dim, workspace)
    k = lift_heads(k_latent, attn.k, of_keys.start, count, attn.head_dim, workspace)
    v = lift_heads(v_latent, attn.v, of_keys.start, count, attn.value_dim, workspace)
    core(q, rotate_(q, attn), rotate_(k, attn), v, attn.of_heads(of_queries))
    return q.view(q.shape[1], -1)
