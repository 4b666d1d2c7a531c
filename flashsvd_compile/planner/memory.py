"""Transient memory of a region in bytes: as the model writes it, and under each strategy.

Every formula is a sympy expression in the graph's symbols. "As written" is the sum of what is alive at the worst moment
when each operation allocates its result, which is what eager execution does.
"""

import sympy

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


def mlp_fused(shape: MlpShape) -> sympy.Expr:
    """Rank-space input and output of the fused core, beside the result, which comes when the input is gone."""
    rank_in, rank_out = shape.latent("hidden"), shape.latent("out")
    return shape.itemsize * shape.rows * max(rank_in + rank_out - shape.features["out"], rank_out)


def mlp_streamed_row(shape: MlpShape) -> int:
    """Workspace of one row when rows are streamed."""
    elements = sum(shape.latent(role) + shape.features[role] for role in shape.into_hidden) + shape.latent("out")
    return shape.itemsize * elements


def attention_as_written(shape: AttentionShape) -> sympy.Expr:
    """q, k, v and the concatenated heads."""
    queries, keys = shape.batch * shape.q_len, shape.batch * shape.kv_len
    merged = heads_width(shape)
    elements = queries * (shape.features["q"] + merged) + keys * (shape.features["k"] + shape.features["v"])
    return shape.itemsize * elements


def attention_streamed(shape: AttentionShape, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The workspace; queries, heads and result share one memory unless the output projection changes the width."""
    out = shape.features.get("out", heads_width(shape))
    merged = 0 if out == heads_width(shape) else shape.batch * shape.q_len * heads_width(shape)
    return workspace_bytes + shape.itemsize * merged


def keys_and_values(shape: AttentionShape) -> sympy.Expr:
    """Keys and values out of rank space, which pass through the workspace."""
    return shape.itemsize * shape.batch * shape.kv_len * (shape.features["k"] + shape.features["v"])


def heads_width(shape: AttentionShape) -> int:
    """Features of the concatenated heads."""
    return shape.features["v"] // shape.num_kv_heads * shape.num_heads
