"""Seconds of a region under each strategy, as formulas in the graph's symbols.

A chain of products and elementwise passes takes the time of its arithmetic at the device's ceiling plus that of its
memory traffic at the device's bandwidth. That the two are added, as if nothing overlapped, is no bound but a fit: it is
within 9 % of the measured baselines of ``benchmarks/results/mlp_region.json`` (see ``tests/planner``).

Sums begin with sympy's numbers, not with Python's: ``1 - x`` and ``1.5 + x`` are sums to sympy even where ``x`` is a
float of its own, and its first one imports its tensors, which takes longer than a plan
(``tests/planner/test_plan_time.py``).
"""

from dataclasses import replace

import sympy

from . import memory
from .device import Device
from .shapes import AttentionShape, LinearShape, MlpShape, RegionShape

ATTENTION_SHARE = 0.6
"""Share of the products' rate that attention reaches (H200, heads of 64)."""
WIDE_HEAD, WIDE_ATTENTION_SHARE = 128, 0.8
"""The same of heads of 128 where they have a kernel in Gluon; what is read and written is in it (H200, 2048 to 16384
keys)."""
MASKED_ATTENTION = 1.55
"""Factor on the time of a GPU library's attention where a mask becomes a bias (H100, 512 to 32768 keys)."""

ACTIVATED_ELEMENT = 1e-12
"""Seconds that an element takes at least where a product is activated as it is computed (H100, rank 96)."""
LARGE_BLOCKS = 0.8
"""Factor on the projections' time where rows occupy the chip by blocks of 128, or queries come with keys and values
(H100, ranks 64 to 256: 0.94 to 1.02 of what is measured)."""
LARGE_ROWS = 128
"""Rows of such a block."""
LARGE_SHARE = 0.75
"""Least share of the processors that such blocks occupy."""
CHUNKED_PROJECTIONS, CHUNKED_FEATURES = 1.12, 1024
"""Factor on the projections' time where they come in chunks, without kernels in Gluon, and their rank is high (H100,
256 to 384 of 768 features), and up to how many features: of 4096 and rank 1024 it is none (H200)."""
FULL_CHUNK = 4096 * 1536
"""Elements of keys and values that fill a GPU. A chunk of so many costs two launches, 3.5 us, a quarter of it 12 to 17
(H100, rank 192, 32x512 and 8x2048); where launches overlap 1 to 3 us, and a quarter of it 9 (16x256: 40 us in one
chunk, 68 in four)."""
CAUSAL_SHARE = 0.525
"""Share of the work of all keys: half of it, and what blocks on the diagonal do in vain (H200, 512 to 32768 keys)."""
CAUSAL_LONGEST = 12e-9
"""Seconds a key: what queries that see all keys take, and so each chunk of causal attention at least (H200, heads of
64: 96 us for 8192 keys of three heads, which are half as much work)."""
LONG_KEYS = 2048
"""Least keys with which three warpgroups share a block of them in our attention to heads of 64, unless it is causal."""
LONG_ATTENTION = 0.92
"""Factor on its time (H200: 0.90 to 0.96)."""
TILE_ROWS = 192
"""Queries of three warpgroups."""
EVEN_SHARE = 0.9
"""Least share of their rounds of the chip that such tiles fill; below it smaller tiles are as fast, and taken."""
UNEVEN_HEADS = 2
"""Factor on attention to heads that a GPU must round up, as it reads them without descriptors: 1.5 measured for 12 key
heads of 40 or 48, 2.6 and 3.5 for one of 40 or 72 (H100, 32x512)."""
ABSORBING_OPERATIONS = 8
"""On the weights' side of an absorbed region: two products, the others cut, pad and reorder factors (as Inductor fuses
them; of those with a bias for keys and values)."""


def linear_kept(shape: LinearShape, device: Device) -> sympy.Expr:
    """Two products."""
    return _projection(shape, device, "w", shape.rows, shape.in_features)


def linear_streamed(shape: LinearShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The same in chunks."""
    return linear_kept(shape, device) + _chunks(memory.linear_as_written(shape), workspace_bytes, device.chunk_seconds)


def linear_merged(shape: LinearShape, device: Device) -> sympy.Expr:
    """The factors multiplied, then one product."""
    return _merged_projection(shape, device, "w", shape.rows, shape.in_features)


def mlp_kept(shape: MlpShape, device: Device) -> sympy.Expr:
    """Products and one elementwise pass over the hidden layer, an operation each."""
    return _mlp_as_a_whole(shape, device) + _activation_pass(shape, device)


def mlp_streamed(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The same in chunks; where products are activated as they are computed and a gate is not in the same launch as the
    hidden layer, it still reads that.
    """
    low_rank = all(rank is not None for rank in shape.ranks.values())
    by_kernel = device.library_single_flops is not None if shape.itemsize == 4 else device.specialised and low_rank
    if by_kernel:
        into = shape.into_hidden
        at_once = shape.itemsize == 2 and any(shape.latent(role) % memory.ALIGNED == 0 for role in into)
        activation = _pass(shape, device, 0 if at_once else len(into) - 1) + _shallow_activation(shape, device)
    else:
        activation = _activation_pass(shape, device)
    return _mlp_as_a_whole(shape, device) + activation + _further_chunks(shape, device, workspace_bytes)


def _shallow_activation(shape: MlpShape, device: Device) -> sympy.Expr:
    """What activating an element takes beyond the product that it is part of, whose depth is the rank."""
    role = shape.into_hidden[-1]
    product = _product(shape, device, shape.rows, shape.latent(role), shape.features[role])
    return memory.maximum(0, ACTIVATED_ELEMENT * shape.rows * shape.features[role] - product)


def _mlp_as_a_whole(shape: MlpShape, device: Device) -> sympy.Expr:
    """Products, and that operations are launched."""
    operations = 1 + _operations(shape)
    return _mlp_products(shape, device, _projection) + operations * device.launch_seconds


def mlp_merged(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """In chunks, with each pair of factors multiplied that costs more than its product."""
    products = _mlp_products(shape, device, _merged_projection)
    launches = (1 + _operations(shape)) * device.launch_seconds
    return products + _activation_pass(shape, device) + launches + _further_chunks(shape, device, workspace_bytes)


def mlp_fused(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Two narrow products around the core, whose hidden layer causes no traffic but costs time to activate."""
    rank_in, rank_out, width = shape.latent("hidden"), shape.latent("out"), shape.features["hidden"]
    narrow = _product(shape, device, shape.rows, shape.in_features, rank_in)
    narrow += _product(shape, device, shape.rows, rank_out, shape.features["out"])
    core = 2 * shape.rows * width * (rank_in + rank_out) / device.flops[shape.itemsize]
    per_element = next(seconds for rank, seconds in device.activation_seconds if max(rank_in, rank_out) <= rank)
    parts = memory.partial_sums(shape, device, workspace_bytes)
    adding_up = sympy.Min(1, parts - 1) * device.launch_seconds
    adding_up += 2 * (parts - 1) * shape.itemsize * shape.rows * rank_out / device.bandwidth
    return narrow + core + shape.rows * width * per_element + 3 * device.launch_seconds + adding_up


def attention_kept(shape: AttentionShape, device: Device) -> sympy.Expr:
    """Projections and the core, an operation each; with a mask all keys are seen by all queries."""
    core = _core(replace(shape, causal=shape.causal and not shape.masked), device)
    core *= MASKED_ATTENTION if shape.masked and device.grows else 1
    operations = 1 + _operations(shape)
    return _attention_projections(shape, device, _projection) + core + operations * device.launch_seconds


def attention_shared_projections(shape: AttentionShape, device: Device) -> sympy.Expr:
    """Projections that the graph computes besides the region."""
    rows = shape.rows_of
    return sympy.Add(*(_projection(shape, device, role, rows(role), shape.in_features) for role in shape.shared))


def attention_streamed(shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Keys and values in chunks."""
    limit = device.full_rate_rank
    projections = _attention_projections(shape, device, _projection)
    if device.specialised and memory.lifts_on_chip(shape, device):
        projections *= _by_blocks(shape, device, workspace_bytes)
    elif limit is not None and max(map(shape.latent, shape.ranks)) > limit and shape.in_features <= CHUNKED_FEATURES:
        projections *= CHUNKED_PROJECTIONS
    core = _core_by_chunks(shape, device, memory.attention_chunks(shape, device, workspace_bytes))
    return projections + core + _attention_launches(shape, workspace_bytes, device)


def _by_blocks(shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Factor on the projections' time: a chunk's rows are lifted at once, in large blocks or small ones.

    In large ones, too, where queries come with them: in no more rounds of the chip than keys and values alone.
    """
    row = shape.itemsize * (shape.features["k"] + shape.features["v"])
    in_chunk = memory.attention_chunks(shape, device, workspace_bytes).bytes / row
    rows = memory.maximum(shape.kv_len, in_chunk)
    two = _indicator(2 * rows / (LARGE_SHARE * device.full_rows))
    of_chip = LARGE_ROWS * memory.ceiling(in_chunk / LARGE_ROWS) / device.full_rows
    more_rounds = memory.ceiling(3 * of_chip) - memory.ceiling(2 * of_chip)
    three = _indicator(in_chunk / shape.kv_len, 2 * 3 * of_chip) * (1 - _indicator(more_rounds))
    return sympy.S.One - (1 - LARGE_BLOCKS) * memory.maximum(two, three)


def _indicator(*ratios) -> sympy.Expr:
    """1 where each of these numbers is at least 1, else 0; of a sympy relation no formula is made."""
    return memory.floor(memory.minimum(1, *ratios))


def attention_merged(
    shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr, merged: AttentionShape
) -> sympy.Expr:
    """In chunks, with each pair of factors multiplied that costs more than its product; chunks as of ``merged``."""
    projections = _attention_projections(shape, device, _merged_projection)
    core = _core_by_chunks(shape, device, memory.attention_chunks(merged, device, workspace_bytes))
    products = sum(rank != merged.ranks[role] for role, rank in shape.ranks.items())
    launches = _attention_launches(merged, workspace_bytes, device) + products * device.launch_seconds
    return projections + core + launches


def attention_absorbed(shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The region in rank space, and for each head the two products of weights that take it there."""
    absorbed = shape.absorbed
    width, head_dim = absorbed.features["q"] // shape.num_heads, shape.features["q"] // shape.num_heads
    value_dim = shape.features["v"] // shape.num_kv_heads
    products = _product(shape, device, width, head_dim, shape.latent("q") or shape.in_features)
    products += _product(shape, device, shape.latent("out") or shape.features["out"], value_dim, width)
    absorbing = shape.num_heads * products + ABSORBING_OPERATIONS * device.launch_seconds
    if width != device.head_size(width):
        absorbing += (UNEVEN_HEADS - 1) * _core(absorbed, device)
    return attention_streamed(absorbed, device, workspace_bytes) + absorbing


def _operations(shape: RegionShape) -> int:
    """Products that the projections take as written."""
    return sum(1 if rank is None else 2 for rank in shape.ranks.values())


def _product(shape: RegionShape, device: Device, rows, depth, width) -> sympy.Expr:
    """``[rows, depth] @ [depth, width]``."""
    rows = sympy.sympify(rows)
    elements = rows * depth + rows * width + depth * width
    return 2 * rows * depth * width / device.flops[shape.itemsize] + shape.itemsize * elements / device.bandwidth


def _projection(shape: RegionShape, device: Device, role: str, rows, in_features) -> sympy.Expr:
    rank, features = shape.ranks[role], shape.features[role]
    if rank is None:
        return _product(shape, device, rows, in_features, features)
    pair = _product(shape, device, rows, in_features, rank) + _product(shape, device, rows, rank, features)
    return pair * device.odd_ranks if shape.itemsize == 2 and rank % memory.STEP else pair


def _merged_projection(shape: RegionShape, device: Device, role: str, rows, in_features) -> sympy.Expr:
    rank, features = shape.ranks[role], shape.features[role]
    if rank is None or not shape.costs_more_than_dense(role, in_features):
        return _projection(shape, device, role, rows, in_features)
    merging = _product(shape, device, features, rank, in_features)
    return merging + _product(shape, device, rows, in_features, features)


def _mlp_products(shape: MlpShape, device: Device, projection) -> sympy.Expr:
    width = shape.features["hidden"]
    into = sum(projection(shape, device, role, shape.rows, shape.in_features) for role in shape.into_hidden)
    return into + projection(shape, device, "out", shape.rows, width)


def _activation_pass(shape: MlpShape, device: Device) -> sympy.Expr:
    """Reads the hidden layer, and the gate if there is one, and writes their activation."""
    return _pass(shape, device, 1 + len(shape.into_hidden))


def _pass(shape: MlpShape, device: Device, tensors: int) -> sympy.Expr:
    """Over tensors of the size of the hidden layer."""
    return shape.itemsize * tensors * shape.rows * shape.features["hidden"] / device.bandwidth


def _attention_projections(shape: AttentionShape, device: Device, projection) -> sympy.Expr:
    queries, keys = shape.batch * shape.q_len, shape.batch * shape.kv_len
    total = projection(shape, device, "q", queries, shape.in_features)
    total += sum(projection(shape, device, role, keys, shape.in_features) for role in ("k", "v"))
    if "out" in shape.ranks:
        total += projection(shape, device, "out", queries, memory.heads_width(shape))
    return total


def _core(shape: AttentionShape, device: Device) -> sympy.Expr:
    sizes = shape.features["q"] // shape.num_heads, shape.features["v"] // shape.num_kv_heads
    width = shape.num_heads * sum(map(device.head_size, sizes))
    flops = 2 * shape.batch * shape.q_len * shape.kv_len * width * (CAUSAL_SHARE if shape.causal else 1)
    if device.specialised and shape.itemsize == 2 and set(sizes) == {WIDE_HEAD}:
        return flops / (WIDE_ATTENTION_SHARE * device.flops[shape.itemsize])
    traffic = memory.attention_as_written(shape)
    return flops / (ATTENTION_SHARE * device.flops[shape.itemsize]) + traffic / device.bandwidth


def _core_by_chunks(shape: AttentionShape, device: Device, cut: memory.Chunks) -> sympy.Expr:
    """Attention's own time; a chunk of causal attention takes at least what queries that see all keys do."""
    core = _core(shape, device) * _of_long_attention(shape, device)
    if not shape.causal or not device.grows:
        return core
    return memory.maximum(core, CAUSAL_LONGEST * shape.kv_len * cut.number)


def _of_long_attention(shape: AttentionShape, device: Device) -> sympy.Expr:
    """Factor on the time of attention: a kernel of large tiles takes it where keys are many and tiles come out even.

    All of them: whether a chunk's do is left out, as for 8 % of attention a plan would take four times the workspace.
    """
    sizes = {shape.features["q"] // shape.num_heads, shape.features["v"] // shape.num_kv_heads}
    if not device.specialised or shape.causal or shape.itemsize != 2 or sizes != {64}:
        return sympy.S.One
    heads, processors = shape.batch * shape.num_heads, sympy.Integer(device.full_rows) / LARGE_ROWS
    rounds = memory.ceiling(heads * memory.ceiling(shape.q_len / TILE_ROWS) / processors)
    filled = heads * shape.q_len / (TILE_ROWS * processors * memory.maximum(1, rounds))
    applies = _indicator(shape.kv_len / LONG_KEYS, filled / EVEN_SHARE)
    return sympy.S.One - (1 - LONG_ATTENTION) * applies


def _attention_launches(shape: AttentionShape, workspace_bytes: sympy.Expr, device: Device) -> sympy.Expr:
    """Queries and output once, then chunks of keys and values; all a chunk where heads pass too.

    A chunk is two operations, or one where they overlap, unless rank space passes through memory: at rank 304 one costs
    20 us, of dense keys and values 5 (H100).
    """
    if not memory.heads_in_place(shape):
        heads = shape.itemsize * shape.batch * shape.q_len * memory.heads_width(shape)
        chunks = sympy.Max(1, (heads + memory.keys_and_values(shape)) / workspace_bytes)
        return device.launch_seconds * (1 + _operations(shape)) * chunks
    once = 2 if "out" in shape.ranks else 1
    low_rank = shape.latent("k") + shape.latent("v")
    chunks, chunk = sympy.Max(1, memory.keys_and_values(shape) / workspace_bytes), 2 * device.launch_seconds
    cut = memory.attention_chunks(shape, device, workspace_bytes)
    if not low_rank and device.grows:
        chunks, chunk = cut.number, chunk * _underfilling(shape, cut)
    elif low_rank and not memory.lifts_on_chip(shape, device):
        chunks, chunk = _chunks_beside_rank_space(shape, workspace_bytes), max(chunk, device.chunk_seconds)
    elif low_rank and device.specialised and not memory.is_short(shape):
        chunks, chunk = cut.number, device.launch_seconds * (3 * _underfilling(shape, cut) - 1) / 2
    return chunk * chunks + device.launch_seconds * once


def _underfilling(shape: AttentionShape, cut: memory.Chunks) -> sympy.Expr:
    """How many such chunks fill the GPU that the whole of keys and values would fill; at least 1."""
    filling = memory.minimum(shape.itemsize * FULL_CHUNK, memory.keys_and_values(shape))
    return memory.maximum(1, filling / memory.maximum(1, cut.bytes))


def _chunks_beside_rank_space(shape: AttentionShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Where rank space is in the workspace, too: of whole items; or of one item's heads, as many as fit next to it."""
    latent = shape.itemsize * shape.kv_len * (shape.latent("k") + shape.latent("v"))
    lifted = memory.keys_and_values(shape)
    of_items = (lifted + shape.batch * latent) / workspace_bytes
    head = shape.itemsize * shape.kv_len * (shape.features["k"] + shape.features["v"]) // shape.num_kv_heads
    return sympy.Max(1, of_items, lifted / sympy.Max(head, workspace_bytes - latent))


def _further_chunks(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """What chunks of rows after the first cost."""
    return device.chunk_seconds * (memory.mlp_chunks(shape, device, workspace_bytes) - 1)


def _chunks(needed: sympy.Expr, workspace_bytes: sympy.Expr, chunk_seconds: float) -> sympy.Expr:
    """What chunks after the first cost."""
    return chunk_seconds * sympy.Max(0, needed / workspace_bytes - 1)
