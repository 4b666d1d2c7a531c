"""PyTorch's own attention kernels as the core of a streamed region.

They differ from device to device in what they allocate: all of the scores where the head sizes of keys and values
differ, a dense additive copy of any boolean mask. Blocks of queries keep both small.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import capped
from .attention_region import UNLIMITED, Attention, full_mask, in_window
from .ranges import ranges
from .replay import reads_values
from .workspace import rows_that_fit

Core = Callable[[Tensor, Tensor, Tensor, Tensor, Attention], None]
"""``core(out, q, k, v, attn)`` attends for lifted heads, ``[items, len, heads, dim]`` each, into ``out``.

``out`` and ``q`` may be the same memory: a block of queries is read before its outputs are written.
"""

PASSING = 3 << 16
"""Elements of heads' outputs that a library kernel returns at a time; they are then copied to where they belong."""
QUERY_BLOCK = 1024
"""Queries that are not cut further: from 768 on the CPU's kernel takes its long tiles, 13 % faster."""
SCORES_PER_BLOCK = 1 << 18
"""Bound of queries times keys where a mask or the scores themselves become a tensor."""
WORTH_A_CALL = 1 << 24
"""Multiplications for an item's scores from which its padding is left out by a call of its own. Below, masking all
items in one call takes 0.3 to 1.0 of the time (two cores, 32 to 192 positions of which 25 to 100 % are visible)."""
SHORTEST_DOCUMENT = 32
"""Positions that packed documents must have on average to be attended to one by one; shorter ones are masked."""


def sdpa_core(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention) -> None:
    """A core for any device, without a look at the values of the mask."""
    _attend(out, q, k, v, attn, slice(0, k.shape[1]))


def cpu_core(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention) -> None:
    """A core that reads the masks' values: what a query cannot see is left out, not masked, where that is a range and
    long enough.
    """
    for items, documents in document_ranges(attn.documents, q.shape[0], q.shape[1]):
        part = attn.of_items(items)
        if documents is None:
            _attend_visible(out[items], q[items], k[items], v[items], part)
            continue
        for document in documents:
            q_, k_, v_ = (tensor[items, document] for tensor in (q, k, v))
            _attend_visible(out[items, document], q_, k_, v_, part.of_document(document))


def document_ranges(documents: Tensor | None, batch: int, length: int) -> Iterator[tuple[slice, list[slice] | None]]:
    """Runs of batch items of the same documents, a range each; ``None`` where they are interrupted or tiny."""
    if documents is None or length == 0:
        yield slice(0, batch), None
        return
    first = 0
    for positions, run in groupby(map(_positions, documents)):
        items = slice(first, first + len(list(run)))
        first = items.stop
        yield items, positions


def _positions(documents: Tensor) -> list[slice] | None:
    """The positions of each document of one item."""
    reads_values()
    values, lengths = documents.unique_consecutive(return_counts=True)
    tiny = documents.numel() < SHORTEST_DOCUMENT * (values.numel() - 1)
    if tiny or values.unique().numel() < values.numel():
        return None
    stops = lengths.cumsum(0).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _attend_visible(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention) -> None:
    """Attend to the range of keys between an item's first and last visible one; to all keys of short items, where a
    mask of padding alone takes no memory worth the name.
    """
    only_padding = attn.mask is None and attn.documents is None and not attn.windowed
    if only_padding and q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3] < WORTH_A_CALL:
        _attend(out, q, k, v, attn, slice(0, k.shape[1]))
        return
    for items, keys in visible_keys(attn.key_padding, q.shape[0], k.shape[1]):
        part = attn.of_items(items)
        if keys is None:
            _attend(out[items], q[items], k[items], v[items], part, slice(0, k.shape[1]))
        else:
            _attend(out[items], q[items], k[items], v[items], part._replace(key_padding=None), keys)


def visible_keys(key_padding: Tensor | None, batch: int, kv_len: int) -> Iterator[tuple[slice, slice | None]]:
    """Runs of batch items with the one range of keys that they see; ``None`` where that range has holes."""
    if key_padding is None or kv_len == 0:
        yield slice(0, batch), slice(0, kv_len)
        return
    reads_values()
    visible = key_padding.to(torch.uint8)
    ranges = zip(
        visible.argmax(1).tolist(),
        (kv_len - visible.flip(1).argmax(1)).tolist(),
        visible.sum(1).tolist(),
        strict=True,
    )
    start = 0
    for (first, stop, count), run in groupby(ranges):
        items = slice(start, start + len(list(run)))
        start = items.stop
        if count == 0:
            yield items, slice(0, 0)
        else:
            yield items, slice(first, stop) if stop - first == count else None


def _attend(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention, keys: slice) -> None:
    """Attend to a range of keys, a block of queries at a time; positions count from the first of all keys."""
    if attn.softcap:
        capped.attend(out, q, k, v, attn, keys)
        return
    one_kernel = q.shape[-1] == v.shape[-1]
    unmasked = attn.mask is None and attn.key_padding is None and attn.documents is None
    if unmasked and is_causal(attn) and one_kernel and attn.scale > 0:  # else PyTorch's kernel gives NaN (2.13, CPU)
        out[:, : keys.start] = 0.0
        visible = slice(keys.start, None)
        _causal(out[:, visible], q[:, visible], k[:, keys], v[:, keys], attn)
        return
    step = max(QUERY_BLOCK, PASSING // max(1, q.shape[0] * v.shape[-1]))
    if attn.windowed or attn.mask is not None or not one_kernel:
        step = min(step, max(1, SCORES_PER_BLOCK // max(1, k.shape[1])))
    if attn.documents is not None:  # a mask of its own for each item
        step = min(step, max(1, SCORES_PER_BLOCK // max(1, k.shape[0] * k.shape[1])))
    for queries in ranges(q.shape[1], step):
        block = in_window(attn, queries, keys)
        mask = full_mask(attn, queries, block, q)
        _by_heads(out[:, queries], q[:, queries], k[:, block], v[:, block], attn, mask)


def _causal(out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention) -> None:
    """All queries at once, as the kernel counts positions from the first."""
    _by_heads(out, q, k, v, attn, is_causal=True)


def passing_elements(q_len: int, heads: int, value_dim: int, causal: bool) -> int:
    """Bound of the outputs of an item that the kernel returns at a time."""
    one_head = value_dim * (q_len if causal else min(q_len, QUERY_BLOCK))
    return min(q_len * heads * value_dim, max(PASSING, one_head))


def _by_heads(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn: Attention, mask: Tensor | None = None, is_causal: bool = False
) -> None:
    """As many heads at a time as :data:`PASSING` allows, at least one."""
    items, queries, heads, value_dim = out.shape
    group = heads // k.shape[2]
    step = rows_that_fit(PASSING, items * queries * value_dim, heads)
    step = step // group * group if step > group else max(n for n in range(1, step + 1) if group % n == 0)
    for some in ranges(heads, step):
        of_keys = slice(some.start // group, (some.stop - 1) // group + 1)
        part = mask
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            part = mask[:, some]
        operands = q[:, :, some], k[:, :, of_keys], v[:, :, of_keys]
        out[:, :, some].copy_(attend_at_once(*operands, attn.scale, part, is_causal))


def is_causal(attn: Attention) -> bool:
    """Whether the window is that of causal attention, and nothing narrower."""
    return (attn.window_left, attn.window_right) == (UNLIMITED, 0)


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    """One call of the library: outputs of lifted heads, all of them ``[items, len, heads, dim]``.

    ``mask`` is broadcastable to ``[items, heads, q_len, kv_len]``.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    outputs = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
    )
    return outputs.transpose(1, 2)
