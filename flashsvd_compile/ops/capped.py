"""Attention with a soft cap on its scores, which no library kernel computes.

    softmax(cap * tanh(scale * q @ k.T / cap) + mask) @ v      Gemma 2, arXiv:2408.00118, section 2

Scores are capped, masked and turned into weights in place and in float32 at least, a block of queries at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_region import Attention, full_mask, in_window
from .ranges import ranges

SCORES = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Scores of a block: on a CPU what stays in cache, on a GPU what fills it. One query of one group of heads at least."""
LEAST_QUERIES = 64
"""Queries a block should have before it has a second group of heads."""
COPIES = 4
"""Widened copies of all scores that :func:`reference` holds at once."""


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn: Attention) -> Tensor:
    """The specification, ``[batch, heads, len, dim]`` each; a query that sees no key gives zeros."""
    if attn.group > 1:
        k, v = (tensor.repeat_interleave(attn.group, dim=1) for tensor in (k, v))
    scores = (q @ k.mT).to(_wide(q)) * attn.scale
    scores = attn.softcap * torch.tanh(scores / attn.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return weights.to(q.dtype) @ v


def scratch(attn: Attention, q_len: int, kv_len: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that :func:`reference` holds for one batch item."""
    widening = torch.promote_types(dtype, torch.float32).itemsize // dtype.itemsize
    repeated = attn.num_heads * kv_len * (attn.head_dim + attn.value_dim) if attn.group > 1 else 0
    return (COPIES * widening + 1) * attn.num_heads * q_len * kv_len + repeated


def attend(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention, keys: slice) -> None:
    """Attend to a range of keys, ``[items, len, heads, dim]`` each; ``out`` and ``q`` may be the same memory."""
    for batch in _batches(out, q, k, v, attn):
        groups, group, q_len, _ = batch.q.shape
        step = max(1, _scores_of_a_block(q) // max(1, groups * group * (keys.stop - keys.start)))
        for queries in ranges(q_len, step):
            block = in_window(attn, queries, keys)
            mask = full_mask(batch.attn, queries, block, q)
            _attend(batch.out[:, :, queries], batch.q[:, :, queries], batch.k[:, block], batch.v[:, block], attn, mask)


class _Batch(NamedTuple):
    """Key heads that one batched product takes.

    Attributes:
        out, q: ``[batch, group, q_len, dim]``.
        k, v: ``[batch, kv_len, dim]``.
        attn: the region, its mask for these.
    """

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attn: Attention


def _batches(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention) -> Iterator[_Batch]:
    """One head of several items, or several heads of one item: either way no product copies its operands."""
    items, kv_len, kv_heads, _ = k.shape
    count = 1
    if items == 1:
        count = max(1, _scores_of_a_block(q) // (LEAST_QUERIES * attn.group * max(1, kv_len)))
    for of_keys in ranges(kv_heads, count):
        heads = slice(of_keys.start * attn.group, of_keys.stop * attn.group)
        outputs, queries = out[:, :, heads].transpose(1, 2), q[:, :, heads].transpose(1, 2)
        part = attn.of_heads(heads)
        if items > 1:
            yield _Batch(outputs, queries, k[:, :, of_keys.start], v[:, :, of_keys.start], part)
            continue
        if part.mask is not None and part.mask.shape[1] > 1:
            part = part._replace(mask=part.mask[0].unflatten(0, (-1, attn.group)))
        outputs, queries = (tensor[0].unflatten(0, (-1, attn.group)) for tensor in (outputs, queries))
        yield _Batch(outputs, queries, k[0, :, of_keys].transpose(0, 1), v[0, :, of_keys].transpose(0, 1), part)


def _attend(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention, mask: Tensor | None) -> None:
    """``out[batch, group, n, value_dim]`` of ``q[batch, group, n, dim]``, ``k`` and ``v[batch, keys, dim]``."""
    if k.shape[1] == 0:
        out.zero_()
        return
    group_of_queries = q.shape[1:3]
    scores = torch.bmm(q.flatten(1, 2), k.mT).to(_wide(q)).unflatten(1, group_of_queries)
    scores.mul_(attn.scale / attn.softcap).tanh_().mul_(attn.softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    _softmax_(scores)
    out.copy_(torch.bmm(scores.flatten(1, 2).to(v.dtype), v).unflatten(1, group_of_queries))


def _softmax_(scores: Tensor) -> None:
    """Over the last dimension, in place; zeros for a row of ``-inf``."""
    limits = torch.finfo(scores.dtype)
    scores.sub_(scores.amax(-1, keepdim=True).clamp_(min=limits.min)).exp_()
    scores.div_(scores.sum(-1, keepdim=True).clamp_(min=limits.tiny))


def _scores_of_a_block(q: Tensor) -> int:
    return SCORES.get(q.device.type, SCORES["cpu"])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
