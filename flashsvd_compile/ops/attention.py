"""``flashsvd::attention_v5``: multi-head attention with its (low-rank) projections, as one operator.

    heads = softmax(scale * rope(norm(q(x))) @ rope(norm(k(context))).T + mask) @ v(context)
    y = out(concatenate(heads))

A soft cap turns the scaled products into ``cap * tanh(products / cap)`` before the mask. In self-attention a norm may
be taken of x first, and a residual is added to y. Keys and values are lifted out of rank space for a few heads at a
time; no tensor of the size of k, v or the scores is ever whole.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..options import Strategy
from . import attention_folded, attention_gpu, capped, norm
from . import projection as proj
from .attention_region import Attention, full_mask, parse, rotate, rotate_
from .backward import Chunked, differentiable, items_of_a_chunk
from .norm import Statistics
from .projection import Projection
from .ranges import ranges, width_of
from .registry import register
from .residual import joined, plus, plus_residual
from .sdpa import Core, cpu_core, is_causal, passing_elements, sdpa_core
from .workspace import Workspace, affine_into, lift_heads, project_rows, rows_of, rows_that_fit

ROLES = ("q", "k", "v", "out")
SCHEMA = (
    f"(Tensor x, Tensor? context=None, {', '.join(map(proj.schema_of, ROLES))}, "
    f"Tensor? residual=None, {norm.schema_of('x')}, Tensor? key_padding=None, Tensor? mask=None, "
    "Tensor? cos=None, Tensor? sin=None, bool interleaved=False, "
    f"{norm.schema_of('q')}, {norm.schema_of('k')}, "
    "int num_heads=1, int num_kv_heads=1, float scale=1.0, float softcap=0.0, int window_left=-1, int window_right=-1, "
    "Tensor? documents=None, str strategy='streamed', SymInt workspace_bytes=16777216) -> Tensor"
)
RESIDUAL = 2 + 4 * len(ROLES)
"""Position among the operator's arguments."""
WEIGHTS_OF_KEYS, WEIGHTS_OF_VALUES = (2 + 4 * ROLES.index(role) + 2 for role in "kv")
"""Those of ``k_up`` and ``v_up``."""


def reference(x: Tensor, *arguments) -> Tensor:
    """The specification, in plain PyTorch and with every intermediate at full size.

    Args:
        x: ``[batch, q_len, in_features]``.
        arguments: ``context[batch, kv_len, in_features]`` (``None``: ``x``), then the fields of :class:`Attention`
            with projections and norms flattened and, behind the projections, the residual
            ``[batch, q_len, out_features]`` or ``None`` and the norm of ``x``; then strategy and workspace bound.

    Returns:
        ``[batch, q_len, out_features]``, contiguous, dtype of ``x``. A query that may attend to no key gives zeros
        before ``out``.
    """
    context, attn, _, _ = parse(x, arguments)
    result, residual = _as_a_whole(x, context, attn), arguments[RESIDUAL - 1]
    return result if residual is None else result + residual


def _as_a_whole(x: Tensor, context: Tensor, attn: Attention) -> Tensor:
    sources = _sources(x, context, attn)
    q = norm.apply(_heads(proj.apply(sources.q, attn.q), attn.num_heads), attn.q_norm).transpose(1, 2)
    k = norm.apply(_heads(proj.apply(sources.k, attn.k), attn.num_kv_heads), attn.k_norm).transpose(1, 2)
    v = _heads(proj.apply(sources.v, attn.v), attn.num_kv_heads).transpose(1, 2)
    q, k = rotate(q, attn), rotate(k, attn)
    mask = full_mask(attn, slice(0, q.shape[2]), slice(0, k.shape[2]), q)
    if attn.softcap:
        heads = capped.reference(q, k, v, mask, attn)
    else:
        with _right_gradients(mask, q, k, v):
            heads = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale, enable_gqa=attn.group > 1)
    del q, k, v
    merged = heads.transpose(1, 2).flatten(2)
    return (merged if attn.out is None else proj.apply(merged, attn.out)).contiguous()


def _right_gradients(mask: Tensor | None, *heads: Tensor) -> AbstractContextManager:
    """Where PyTorch attends so that it can be differentiated.

    On a CPU its fused kernel multiplies the gradients of a query that sees no key, as a mask of large negative numbers
    says it, by the number of keys (PyTorch 2.13).
    """
    added = mask is not None and mask.is_floating_point() and mask.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if added and any(t.requires_grad for t in heads) else nullcontext()


class Sources(NamedTuple):
    """What queries, keys and values are projections of, ``[items, len, in_features]`` each."""

    q: Tensor
    k: Tensor
    v: Tensor


def _sources(x: Tensor, context: Tensor, attn: Attention) -> Sources:
    """Input and context, which are one if there is a norm of the input."""
    if attn.x_norm is None:
        return Sources(x, context, context)
    x = norm.of_rows(x, attn.x_norm)
    return Sources(x, x, x)


def _heads(projected: Tensor, heads: int) -> Tensor:
    """``[batch, len, heads * dim]`` as ``[batch, len, heads, dim]``."""
    return projected.unflatten(-1, (heads, -1))


def _fake(x: Tensor, *arguments) -> Tensor:
    _, attn, _, _ = parse(x, arguments)
    return x.new_empty((x.shape[0], x.shape[1], attn.out_features))


@plus_residual(RESIDUAL)
def _cpu(x: Tensor, *arguments) -> Tensor:
    context, attn, strategy, workspace_bytes = parse(x, arguments)
    attn = attn.merged() if strategy == Strategy.MERGED else attn
    if scratch_as_a_whole(x, context, attn) <= workspace_bytes:
        return _as_a_whole(x, context, attn)
    if attention_folded.supported(x, context, attn) and _is_smaller_folded(x, attn, workspace_bytes):
        return attention_folded.streamed(x, context, attn, workspace_bytes, core=cpu_core)
    return streamed(x, context, attn, workspace_bytes, core=cpu_core)


def _is_smaller_folded(x: Tensor, attn: Attention, workspace_bytes: int) -> bool:
    """Whether :func:`streamed`, with an item's rank space, exceeds the workspace and the folded form needs less."""
    (batch, length, _), elements = x.shape, workspace_bytes // x.element_size()
    passing = passing_elements(length, attn.num_heads, attn.value_dim, is_causal(attn))
    needed = chunking(attn, batch, length, length, elements).elements
    return needed + passing > elements and attention_folded.needed(attn, length, elements) < needed


def scratch_as_a_whole(x: Tensor, context: Tensor, attn: Attention) -> int:
    """Bytes that :func:`_as_a_whole` holds next to its result; a small region is mostly the launching of operations."""
    (batch, q_len, _), kv_len = x.shape, context.shape[1]
    copies = 1 if attn.cos is None else 3  # a rotation is a sum of two products
    if attn.normed:
        copies = max(copies, norm.copies(x.dtype))
    queries = q_len * (attn.num_heads * attn.head_dim * copies + attn.merged_width + proj.rank(attn.q))
    keys = kv_len * attn.num_kv_heads * (attn.head_dim * copies + attn.value_dim)
    scores = q_len * kv_len if attn.head_dim == attn.value_dim else 3 * attn.num_heads * q_len * kv_len
    if attn.softcap:
        scores = capped.scratch(attn, q_len, kv_len, x.dtype)
    scores += 0 if attn.documents is None else q_len * kv_len  # booleans of each item
    normalised = 0 if attn.x_norm is None else q_len * x.shape[-1]
    return batch * (normalised + queries + keys + scores) * x.element_size()


def _cuda(x: Tensor, *arguments) -> Tensor:
    context, attn, strategy, workspace_bytes = parse(x, arguments)
    merging, residual = strategy == Strategy.MERGED, arguments[RESIDUAL - 1]
    if context.shape[1] and attention_gpu.supported(x, attn):
        region = partial(attention_gpu.streamed, x, context, attn, workspace_bytes, merges=merging)
        return joined(region, residual)
    attn = attn.merged() if merging else attn
    core = attention_gpu.kernel_core if attention_gpu.attends(x, attn) else sdpa_core
    return plus(streamed(x, context, attn, workspace_bytes, core=core), residual)


class Chunking(NamedTuple):
    """Batch items and key heads that :func:`streamed` lifts at a time.

    Attributes:
        items, kv_heads: how many.
        elements: elements of workspace that this needs.
        norm_scratch: elements that norms may allocate next to it.
        fits: whether that is within the bound, with what the core allocates.
    """

    items: int
    kv_heads: int
    elements: int
    norm_scratch: int
    fits: bool


def chunking(
    attn: Attention, batch: int, q_len: int, kv_len: int, workspace_elements: int, with_queries: bool = False
) -> Chunking:
    """The largest chunk that fits: whole items if one fits, else head groups of one item, at least one group.

    Rank space of a chunk's keys and values is in the workspace, with that of its queries where that comes with it.

    What the core allocates by itself (a block of heads' outputs, half a rotation) counts towards the bound, and so do
    norms of queries and keys: a quarter of it is for their blocks, and the statistics of whole keys are held. So does
    the norm of the input, which is held next to the workspace for the chunk's items, for one item at least.
    """
    norm_scratch = workspace_elements // 4 if attn.normed else 0
    workspace_elements -= norm_scratch
    whole_keys = attn.k_norm is not None and attn.k_norm.whole
    normalised = 0 if attn.x_norm is None else q_len * proj.in_features(attn.q)
    held = 0 if attn.queries_in_place else q_len * attn.num_heads * attn.head_dim
    held += 0 if attn.heads_in_place else q_len * attn.merged_width
    held += 4 * kv_len if whole_keys else 0  # a mean and a scale, float32
    latent = kv_len * (proj.rank(attn.k) + proj.rank(attn.v)) + (q_len * proj.rank(attn.q) if with_queries else 0)
    lifted = kv_len * (attn.head_dim + attn.value_dim)
    rotating = 0 if attn.cos is None else max(q_len * attn.group, kv_len) * attn.cos.shape[-1] // 2
    passing = passing_elements(q_len, attn.num_heads, attn.value_dim, is_causal(attn))
    left = workspace_elements - max(0, passing - rotating)  # heads are rotated before any are attended to
    item = held + latent + attn.num_kv_heads * (lifted + rotating)
    items, kv_heads = 1, attn.num_kv_heads
    if item + normalised <= left:
        items = rows_that_fit(left, item + normalised, batch)
    else:
        kv_heads = rows_that_fit(left - held - latent, lifted + rotating, attn.num_kv_heads)
    row = max(0 if with_queries else proj.rank(attn.q), 0 if attn.out is None else attn.out.up.shape[1])
    rows = max(1, min(items * q_len, (left - items * held) // max(1, row)))
    lifting = max(kv_heads * lifted, attn.num_kv_heads * attn.head_dim if whole_keys else 0)
    needed = items * held + max(rows * row, items * (latent + lifting))
    return Chunking(items, kv_heads, needed, norm_scratch, needed <= left)


def streamed(x: Tensor, context: Tensor, attn: Attention, workspace_bytes: int, core: Core) -> Tensor:
    """Attend for a few batch items or heads at a time, so that the peak is the result plus one workspace.

    The result's memory holds first the queries, then the heads' outputs, then the output projection, wherever these
    have one size. Keys and values are lifted out of rank space for one group of heads at a time.
    """
    batch, q_len, _ = x.shape
    kv_len = context.shape[1]
    result = x.new_empty(batch, q_len, attn.out_features)
    if result.numel() == 0:
        return result
    elements = workspace_bytes // x.element_size()
    chunk, latents = chunking(attn, batch, q_len, kv_len, elements), []
    if chunk.items < batch and _comes_together(x, context, attn):
        with_queries = chunking(attn, batch, q_len, kv_len, elements, with_queries=True)
        if with_queries.fits and with_queries.kv_heads == chunk.kv_heads:
            chunk, latents = with_queries, _all_latents(result, x, attn, elements)
            attn = attn._replace(q=_above(attn.q), k=_above(attn.k), v=_above(attn.v))
    workspace = Workspace(chunk.elements, like=x, aligned=4)
    for items in ranges(batch, chunk.items):
        workspace.reset()
        if latents:
            sources = Sources(*_copied([latent[items] for latent in latents], workspace))
        else:
            sources = _sources(x[items], context[items], attn)
        merged = result[items]
        if not attn.heads_in_place:
            merged = workspace.aligned().take(*merged.shape[:2], attn.merged_width)
        mark = workspace.mark()
        _attend(merged, sources, attn.of_items(items), chunk, workspace, core)
        if attn.out is not None:
            workspace.reset(mark)
            project_rows(rows_of(result[items]), rows_of(merged), attn.out, workspace)
    return result


def _comes_together(x: Tensor, context: Tensor, attn: Attention) -> bool:
    """Whether rank space of all items comes at once, over the result: in float32 self-attention on a CPU, where it has
    room and no norm needs any.

    Products of all rows take 0.85 of the time of as many of an item each (two cores, 512 rows an item).
    """
    if x.device.type != "cpu" or x.element_size() < 4 or x is not context or attn.normed or attn.x_norm is not None:
        return False
    return attention_folded.rank_space_fits((attn.q, attn.k, attn.v), attn.out_features)


def _all_latents(result: Tensor, x: Tensor, attn: Attention, elements: int) -> list[Tensor]:
    """Rank space of queries, keys and values, ``[batch, len, rank]`` each, side by side in the result's memory."""
    columns = attention_folded.columns(rows_of(result), [proj.rank(p) for p in (attn.q, attn.k, attn.v)])
    attention_folded.into_rank_space(columns, rows_of(x), rows_of(x), attn, elements)
    return [column.unflatten(0, result.shape[:2]) for column in columns]


def _above(projection: Projection[Tensor]) -> Projection[Tensor]:
    """What lifts a projection's rank space, as a projection of that."""
    return projection._replace(down=None, down_bias=None)


def _copied(latents: list[Tensor], workspace: Workspace) -> list[Tensor]:
    """Rank space out of the way of what its memory is for."""
    return [workspace.take(*latent.shape).copy_(latent) for latent in latents]


def _attend(
    merged: Tensor, sources: Sources, attn: Attention, chunk: Chunking, workspace: Workspace, core: Core
) -> None:
    """Fill ``merged[items, q_len, heads * value_dim]``, ``chunk.kv_heads`` key heads at a time."""
    queries = merged
    if not attn.queries_in_place:
        queries = workspace.aligned().take(*merged.shape[:2], attn.num_heads * attn.head_dim)
    project_rows(rows_of(queries), rows_of(sources.q), attn.q, workspace)
    queries = norm.apply_(queries.unflatten(-1, (attn.num_heads, attn.head_dim)), attn.q_norm, chunk.norm_scratch)
    outputs = merged.unflatten(-1, (attn.num_heads, attn.value_dim))
    latent_k = _latent(sources.k, attn.k, workspace)
    latent_v = _latent(sources.v, attn.v, workspace)
    mark = workspace.mark()
    known = _statistics_of_keys(latent_k, attn, chunk, workspace)
    for of_keys in ranges(attn.num_kv_heads, chunk.kv_heads):
        workspace.reset(mark)
        first, count = of_keys.start, width_of(of_keys)
        heads = slice(of_keys.start * attn.group, of_keys.stop * attn.group)
        q = rotate_(queries[:, :, heads], attn)
        k = lift_heads(latent_k, attn.k, first, count, attn.head_dim, workspace)
        k_norm = None if attn.k_norm is None else attn.k_norm.of_heads(of_keys)
        k = rotate_(norm.apply_(k, k_norm, chunk.norm_scratch, known), attn)
        v = lift_heads(latent_v, attn.v, first, count, attn.value_dim, workspace)
        core(outputs[:, :, heads], q, k, v, attn.of_heads(heads))


def _statistics_of_keys(latent: Tensor, attn: Attention, chunk: Chunking, workspace: Workspace) -> Statistics | None:
    """Statistics of a norm over all heads' keys where few heads are lifted at a time: all heads of a few positions."""
    if attn.k_norm is None or not attn.k_norm.whole or chunk.kv_heads == attn.num_kv_heads:
        return None
    mark, rows = workspace.mark(), rows_of(latent)
    width = attn.num_kv_heads * attn.head_dim
    step = rows_that_fit(min(workspace.left(), chunk.norm_scratch // norm.copies(latent.dtype)), width, len(rows))
    blocks = []
    for start in range(0, max(1, len(rows)), step):
        workspace.reset(mark)
        block = rows[start : start + step]
        lifted = affine_into(workspace.take(len(block), width), block, attn.k.up, attn.k.up_bias)
        blocks.append(norm.statistics(_heads(lifted, attn.num_kv_heads), attn.k_norm))
    return Statistics.of_blocks(blocks)


def _latent(source: Tensor, projection: Projection[Tensor], workspace: Workspace) -> Tensor:
    """``[items, len, rank]``; the input itself for a dense projection."""
    if projection.down is None:
        return source
    latent = workspace.take(source.shape[0], source.shape[1], proj.rank(projection))
    affine_into(rows_of(latent), rows_of(source), projection.down, projection.down_bias)
    return latent


PER_ITEM = ("x", "context", "key_padding", "mask", "cos", "sin", "documents")


def _cut(grad: Tensor, arguments: tuple) -> Chunked:
    """Batch items; a mask gets its batch dimension first, and what all items share stays whole."""
    x = arguments[0]
    context, attn, _, workspace_bytes = parse(x, arguments[1:])
    names = [argument.name for argument in attention._schema.arguments]
    arguments = tuple(attn.mask if name == "mask" else a for name, a in zip(names, arguments, strict=True))
    per_item = frozenset(
        i
        for i, (name, argument) in enumerate(zip(names, arguments, strict=True))
        if name in PER_ITEM and argument is not None and argument.shape[0] == x.shape[0]
    )
    whole = chunking(attn, x.shape[0], x.shape[1], context.shape[1], workspace_elements=1 << 62)
    elements_per_item = whole.elements // max(1, whole.items)
    step = items_of_a_chunk(x, x.shape[0], x.shape[1], elements_per_item, workspace_bytes)
    return Chunked(grad, arguments, per_item, step)


attention = register(
    "attention_v5",
    SCHEMA,
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    weight=WEIGHTS_OF_VALUES,
    neighbours=(WEIGHTS_OF_KEYS, WEIGHTS_OF_VALUES),
)
differentiable(attention, reference, _cut, added=RESIDUAL)
