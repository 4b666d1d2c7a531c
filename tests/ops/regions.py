"""Random regions: argument tuples for the operators, in the order of their schemas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashsvd_compile.ops.norm import KINDS, NONE
from flashsvd_compile.ops.projection import Projection

DEFAULT_WORKSPACE = 1 << 24
ABSENT = Projection(None, None, None, None)
NO_NORM = (NONE, None, None, 0.0, False)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape and, unless expanded along its first dimension, the same values in other strides."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.mT.contiguous().mT
    if layout == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded" and tensor.shape[0] > 1:
        return tensor[:1].expand_as(tensor)
    return tensor


def random(*shape: int, dtype: torch.dtype, layout: str = "contiguous", scale: float = 1.0) -> Tensor:
    return laid_out((torch.randn(*shape, dtype=torch.float64) * scale).to(dtype), layout)


def projection(
    in_features: int,
    out_features: int,
    rank: int | None,
    *,
    bias: bool = True,
    down_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> Projection:
    """A projection that keeps the scale of its input; ``rank=None`` makes it dense."""
    inner = in_features if rank is None else rank
    down = None if rank is None else random(rank, in_features, dtype=dtype, layout=layout, scale=in_features**-0.5)
    return Projection(
        down,
        random(rank, dtype=dtype, layout=layout) if down_bias and rank is not None else None,
        random(out_features, inner, dtype=dtype, layout=layout, scale=inner**-0.5),
        random(out_features, dtype=dtype, layout=layout) if bias else None,
    )


def linear_arguments(
    *shape: int,
    out_features: int = 24,
    rank: int | None = 5,
    bias: bool = True,
    down_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    strategy: str = "streamed",
    workspace_bytes: int = DEFAULT_WORKSPACE,
) -> tuple:
    """Arguments of ``linear_v1`` for ``x`` of the given shape."""
    w = projection(shape[-1], out_features, rank, bias=bias, down_bias=down_bias, dtype=dtype, layout=layout)
    return (random(*shape, dtype=dtype, layout=layout), *w, strategy, workspace_bytes)


def packed_linear_arguments(
    *shape: int,
    ranks: Sequence[int | None] = (5, 3, 6),
    bias: bool = True,
    down_bias: bool = False,
    residual: bool = False,
    x_norm: tuple = NO_NORM,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    workspace_bytes: int = DEFAULT_WORKSPACE,
) -> tuple:
    """Arguments of ``packed_linear_v2`` for ``x`` of the given shape: up to three projections of unequal widths."""
    how = {"bias": bias, "down_bias": down_bias, "dtype": dtype, "layout": layout}
    widths = [9 + 8 * i for i in range(len(ranks))]
    members = [projection(shape[-1], width, rank, **how) for width, rank in zip(widths, ranks, strict=True)]
    members += [ABSENT] * (3 - len(members))
    tensors = [tensor for member in members for tensor in member]
    x = random(*shape, dtype=dtype, layout=layout)
    added = random(*shape[:-1], sum(widths), dtype=dtype, layout=layout) if residual else None
    return (x, *tensors, added, *x_norm, workspace_bytes)


def mlp_arguments(
    *shape: int,
    width: int = 40,
    out_features: int = 16,
    ranks: tuple[int | None, int | None, int | None] = (5, 3, 6),
    gated: bool = False,
    bias: bool = True,
    down_bias: bool = False,
    residual: bool = False,
    x_norm: tuple = NO_NORM,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    strategy: str = "streamed",
    workspace_bytes: int = DEFAULT_WORKSPACE,
) -> tuple:
    """Arguments of ``mlp_v3`` for ``x`` of the given shape; ``ranks`` of hidden, gate and out."""
    how = {"bias": bias, "down_bias": down_bias, "dtype": dtype, "layout": layout}
    hidden = projection(shape[-1], width, ranks[0], **how)
    gate = projection(shape[-1], width, ranks[1], **how) if gated else ABSENT
    out = projection(width, out_features, ranks[2], **how)
    x = random(*shape, dtype=dtype, layout=layout)
    added = random(*shape[:-1], out_features, dtype=dtype, layout=layout) if residual else None
    return (x, *hidden, *gate, *out, added, *x_norm, activation, strategy, workspace_bytes)


def attention_arguments(
    batch: int = 2,
    q_len: int = 7,
    kv_len: int | None = None,
    features: int = 32,
    *,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int = 8,
    value_dim: int | None = None,
    ranks: tuple[int | None, int | None, int | None, int | None] = (5, 4, 3, 6),
    out: bool = True,
    out_features: int | None = None,
    side_by_side: bool = False,
    bias: bool = True,
    down_bias: bool = False,
    residual: bool = False,
    x_norm: tuple = NO_NORM,
    key_padding: Tensor | None = None,
    mask: Tensor | None = None,
    rotary_dim: int = 0,
    rotation_per_item: bool = False,
    interleaved: bool = False,
    q_norm: tuple = NO_NORM,
    k_norm: tuple = NO_NORM,
    softcap: float = 0.0,
    window: tuple[int, int] = (-1, -1),
    documents: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    strategy: str = "streamed",
    workspace_bytes: int = DEFAULT_WORKSPACE,
) -> tuple:
    """Arguments of ``attention_v5``; a ``kv_len`` makes it cross-attention, ``ranks`` are of q, k, v and out.

    Norms are as :func:`norm` makes them. ``side_by_side``: the weight of values lies behind that of keys in one tensor.
    """
    num_kv_heads = num_kv_heads or num_heads
    value_dim = value_dim or head_dim
    how = {"bias": bias, "down_bias": down_bias, "dtype": dtype, "layout": layout}
    x = random(batch, q_len, features, dtype=dtype, layout=layout)
    context = None if kv_len is None else random(batch, kv_len, features, dtype=dtype, layout=layout)
    q = projection(features, num_heads * head_dim, ranks[0], **how)
    k = projection(features, num_kv_heads * head_dim, ranks[1], **how)
    v = projection(features, num_kv_heads * value_dim, ranks[2], **how)
    if side_by_side:
        up = torch.cat((k.up, v.up)).split((len(k.up), len(v.up)))
        k, v = k._replace(up=up[0]), v._replace(up=up[1])
    merged = num_heads * value_dim
    o = projection(merged, out_features or features, ranks[3], **how) if out else ABSENT
    width = (out_features or features) if out else merged
    added = random(batch, q_len, width, dtype=dtype, layout=layout) if residual else None
    cos, sin = rotation(batch if rotation_per_item else 1, q_len, rotary_dim, dtype) if rotary_dim else (None, None)
    heads = (num_heads, num_kv_heads, head_dim**-0.5, softcap)
    options = (cos, sin, interleaved, *q_norm, *k_norm, *heads, *window, documents, strategy, workspace_bytes)
    return (x, context, *q, *k, *v, *o, added, *x_norm, key_padding, mask, *options)


def norm(
    kind: str,
    *shape: int,
    weight: bool = True,
    bias: bool = False,
    eps: float = 1e-5,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    """The arguments of one norm, its weight and bias of the given shape."""
    assert kind in KINDS
    affine = [random(*shape, dtype=dtype) + 1 if weight else None, random(*shape, dtype=dtype) if bias else None]
    return (kind, *affine, eps, whole)


def rotation(batch: int, length: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, ``[batch, length, rotary_dim]``."""
    angles = torch.rand(batch, length, rotary_dim, dtype=torch.float64) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def padding(*lengths: int, total: int, left: bool = False) -> Tensor:
    """``[len(lengths), total]`` bool: that many visible keys an item, at the start or, with ``left``, at the end."""
    positions = torch.arange(total)
    positions = positions.flip(0) if left else positions
    return positions < torch.tensor(lengths)[:, None]


def packed(*lengths: int, batch: int = 1) -> Tensor:
    """``[batch, sum(lengths)]`` integers: documents of these lengths one after the other, numbered from 0."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(batch, -1)
