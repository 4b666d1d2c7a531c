"""Transient memory of a region in bytes: as the model writes it, and under each strategy.

Every formula is a sympy expression in the graph's symbols. "As written" is the sum of what is alive at the worst moment
when each operation allocates its result, which is what eager execution does.
"""

from fractions import Fraction

import sympy

from .device import Device
from .shapes import AttentionShape, LinearShape, MlpShape


def linear_as_written(shape: LinearShape) -> sympy.Expr:
    """The rank-space intermediate."""
    return shape.itemsize * shape.rows * shape.latent("w")


def merged_weight(shape: LinearShape) -> sympy.Expr:
    """The factors' product."""
    return sympy.sympify(shape.itemsize * shape.in_features * shape.features["w"])


def mlp_as_written(shape: MlpShape) -> sympy.Expr:
    """The hidden tensor with its activation; with a gate both factors and their product."""
    return shape.itemsize * shape.rows * (1 + len(shape.into_hidden)) * shape.features["hidden"]


def mlp_fused(shape: MlpShape, device: Device) -> sympy.Expr:
    """Rank-space input and partial sums of the fused core, beside the result, which comes when they are gone."""
    rank_in, rank_out = shape.latent("hidden"), shape.latent("out")
    beside = rank_in + rank_out * partial_sums(shape, device) - shape.features["out"]
    return shape.itemsize * shape.rows * sympy.Max(beside, rank_out)


SHARE_FOR_PARTIAL_SUMS = Fraction(3, 5)
"""Of the input, what partial sums may take beside the result."""


def partial_sums(shape: MlpShape, device: Device) -> sympy.Expr:
    """Parts of the hidden layer that are computed side by side where rows are too few to fill the device."""
    room = shape.features["out"] + sympy.Rational(SHARE_FOR_PARTIAL_SUMS) * shape.in_features - shape.latent("hidden")
    most = sympy.floor(room / shape.latent("out"))
    return sympy.Max(1, sympy.Min(most, sympy.floor(device.full_rows / shape.rows)))


def mlp_streamed(shape: MlpShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The workspace of one chunk of rows."""
    return sympy.ceiling(shape.rows / mlp_chunks(shape, workspace_bytes)) * _mlp_streamed_row(shape)


def mlp_chunks(shape: MlpShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Chunks of rows, evenly cut."""
    fitting = sympy.Max(1, sympy.floor(workspace_bytes / _mlp_streamed_row(shape)))
    return sympy.ceiling(shape.rows / fitting)


def _mlp_streamed_row(shape: MlpShape) -> int:
    """Bytes of one row: its hidden layer, and what of its rank space does not fit where its result goes."""
    room = shape.features["out"] if shape.ranks["out"] is not None else 0
    beside = 0
    for rank in (shape.latent(role) for role in (*shape.into_hidden, "out")):
        room, beside = (room - rank, beside) if rank <= room else (room, beside + rank)
    hidden = len(shape.into_hidden) * shape.features["hidden"]
    return shape.itemsize * (beside + max(hidden, shape.latent("out")))


def attention_as_written(shape: AttentionShape) -> sympy.Expr:
    """q, k, v and the concatenated heads."""
    queries, keys = shape.batch * shape.q_len, shape.batch * shape.kv_len
    merged = heads_width(shape)
    elements = queries * (shape.features["q"] + merged) + keys * (shape.features["k"] + shape.features["v"])
    return shape.itemsize * elements


def attention_streamed(shape: AttentionShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The workspace's chunk of keys and values: items, or heads of one, evenly cut.

    Where the output projection changes the width, it holds the heads too, at least those of one item and one head of
    keys and values.
    """
    if heads_in_place(shape):
        return _chunk_of_keys(shape, workspace_bytes)
    one_head = (shape.features["k"] + shape.features["v"]) // shape.num_kv_heads
    least = shape.q_len * heads_width(shape) + shape.kv_len * one_head
    return sympy.Max(workspace_bytes, shape.itemsize * least)


def _chunk_of_keys(shape: AttentionShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Rank space is left out: on a GPU it may be on chip, and it is a part of a head's keys elsewhere."""
    item = shape.itemsize * shape.kv_len * (shape.features["k"] + shape.features["v"])
    head = sympy.sympify(item) / shape.num_kv_heads
    whole_items = item * _evenly(shape.batch, workspace_bytes / item)
    heads = head * _evenly(sympy.Integer(shape.num_kv_heads), workspace_bytes / head)
    fits = sympy.Min(1, sympy.floor(workspace_bytes / item))
    return sympy.Min(workspace_bytes, fits * whole_items + (1 - fits) * heads)


def _evenly(count: sympy.Expr, fitting: sympy.Expr) -> sympy.Expr:
    """The most of ``count`` things that pass at a time where about ``fitting`` fit and no short rest is left."""
    return sympy.ceiling(count / sympy.ceiling(count / sympy.Max(1, sympy.floor(fitting))))


def attention_absorbed(shape: AttentionShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The absorbed form's workspace and its weights."""
    absorbed = shape.absorbed
    transient = sympy.Min(attention_streamed(absorbed, workspace_bytes), attention_as_written(absorbed))
    elements = (shape.latent("q") or shape.in_features) * absorbed.features["q"]
    elements += (shape.latent("out") or shape.features["out"]) * heads_width(absorbed)
    elements += shape.in_features * (absorbed.features["k"] + absorbed.features["v"])
    return transient + shape.itemsize * elements


def keys_and_values(shape: AttentionShape) -> sympy.Expr:
    """Keys and values out of rank space, which pass through the workspace."""
    return shape.itemsize * shape.batch * shape.kv_len * (shape.features["k"] + shape.features["v"])


def heads_in_place(shape: AttentionShape) -> bool:
    """Whether queries, heads and result share one memory."""
    return shape.features.get("out", heads_width(shape)) == heads_width(shape)


def heads_width(shape: AttentionShape) -> int:
    """Features of the concatenated heads."""
    return shape.features["v"] // shape.num_kv_heads * shape.num_heads
