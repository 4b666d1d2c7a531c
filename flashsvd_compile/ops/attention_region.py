"""What an attention region is: its tensors and numbers, its checks, its masks and its rotation."""

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DtypeError, InvalidOptionError, ShapeError
from . import norm
from . import projection as proj
from .norm import Norm
from .projection import Projection
from .residual import validate_residual
from .workspace import validate_execution

UNLIMITED = -1


class Attention(NamedTuple):
    """One attention region.

    Attributes:
        q, k, v: projections to ``num_heads * head_dim``, ``num_kv_heads * head_dim``, ``num_kv_heads * value_dim``.
        out: projection of the concatenated heads, or ``None`` to return them as they are.
        key_padding: ``[batch, kv_len]`` bool, true where a key may be attended to, or ``None``.
        mask: bool or additive, broadcastable to ``[batch, num_heads, q_len, kv_len]``, or ``None``.
        cos, sin: ``[batch or 1, len, rotary_dim]`` rotation of queries and keys, or ``None``.
        interleaved: rotation pairs neighbours (2i, 2i+1) instead of halves (i, i + rotary_dim / 2).
        q_norm, k_norm: normalisation of queries and of keys before their rotation, or ``None``.
        num_heads, num_kv_heads: queries' and keys' heads; the former a multiple of the latter.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before they are masked; 0 leaves them as they are.
        window_left, window_right: key ``j`` is visible to query ``i`` when ``i - left <= j <= i + right``;
            :data:`UNLIMITED` lifts a side. Causal attention is ``window_right=0``.
        documents: ``[batch, len]`` integers or bool, or ``None``: a query sees only keys whose number is its own. For
            self-attention, where several documents are packed into one item.
        x_norm: normalisation of the input of self-attention, or ``None``.
    """

    q: Projection[Tensor]
    k: Projection[Tensor]
    v: Projection[Tensor]
    out: Projection[Tensor] | None
    key_padding: Tensor | None
    mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    q_norm: Norm | None
    k_norm: Norm | None
    num_heads: int
    num_kv_heads: int
    scale: float
    softcap: float
    window_left: int
    window_right: int
    documents: Tensor | None = None
    x_norm: Norm | None = None

    @property
    def head_dim(self) -> int:
        return proj.out_features(self.q) // self.num_heads

    @property
    def value_dim(self) -> int:
        return proj.out_features(self.v) // self.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def merged_width(self) -> int:
        """Size of the concatenated heads."""
        return self.num_heads * self.value_dim

    @property
    def out_features(self) -> int:
        return self.merged_width if self.out is None else proj.out_features(self.out)

    @property
    def queries_in_place(self) -> bool:
        """Whether the queries fit where the heads' outputs go."""
        return self.head_dim == self.value_dim

    @property
    def heads_in_place(self) -> bool:
        """Whether the heads' outputs fit where the result goes."""
        return self.merged_width == self.out_features

    @property
    def normed(self) -> bool:
        """Whether queries or keys are normalised."""
        return self.q_norm is not None or self.k_norm is not None

    @property
    def windowed(self) -> bool:
        """Whether a query sees a range of positions only, as in causal attention."""
        return (self.window_left, self.window_right) != (UNLIMITED, UNLIMITED)

    def merged(self) -> "Attention":
        """The region with each projection dense whose factors cost more."""
        q, k, v = (proj.merge_if_cheaper(p) for p in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v, out=self.out and proj.merge_if_cheaper(self.out))

    def of_items(self, items: slice) -> "Attention":
        """The region restricted to some batch items."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[items]

        per_item = ("key_padding", "mask", "cos", "sin", "documents")
        return self._replace(**{name: of(getattr(self, name)) for name in per_item})

    def of_document(self, positions: slice) -> "Attention":
        """The region restricted to the positions of one document, as far as a core looks at it."""
        padding, mask = self.key_padding, self.mask
        if mask is not None:
            mask = _block(_block(mask, -2, positions), -1, positions)
        return self._replace(key_padding=None if padding is None else padding[:, positions], mask=mask, documents=None)

    def of_heads(self, heads: slice) -> "Attention":
        """The region restricted to some query heads, as far as a core looks at it."""
        if self.mask is None or self.mask.shape[1] == 1:
            return self
        return self._replace(mask=self.mask[:, heads])


def full_mask(attn: Attention, queries: slice, keys: slice, like: Tensor) -> Tensor | None:
    """All of the region's masks for a block of queries and keys, broadcastable to ``[batch, heads, q, k]``."""
    mask = attn.mask
    if mask is not None:
        mask = _block(_block(mask, -2, queries), -1, keys)
    allowed = None
    if attn.key_padding is not None:
        allowed = attn.key_padding[:, None, None, keys]
    if attn.documents is not None:
        visible = attn.documents[:, None, queries, None] == attn.documents[:, None, None, keys]
        allowed = visible if allowed is None else allowed & visible
    if attn.windowed:
        i = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=like.device)[None, :]
        if attn.window_right != UNLIMITED:
            visible = j <= i + attn.window_right
            allowed = visible if allowed is None else allowed & visible
        if attn.window_left != UNLIMITED:
            visible = j >= i - attn.window_left
            allowed = visible if allowed is None else allowed & visible
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))


def _block(mask: Tensor, dim: int, block: slice) -> Tensor:
    return mask if mask.shape[dim] == 1 else mask.narrow(dim, block.start, block.stop - block.start)


def in_window(attn: Attention, queries: slice, keys: slice) -> slice:
    """The keys that any of the queries can see through the window."""
    start, stop = keys.start, keys.stop
    if attn.window_left != UNLIMITED:
        start = max(start, queries.start - attn.window_left)
    if attn.window_right != UNLIMITED:
        stop = min(stop, queries.stop + attn.window_right)
    return slice(min(start, stop), stop)


def rotate(heads: Tensor, attn: Attention) -> Tensor:
    """Rotary position embedding of ``[batch, heads, len, head_dim]`` (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Computed in the tables' dtype, which may be float32 whatever that of the heads is.
    """
    if attn.cos is None or attn.sin is None:
        return heads
    cos, sin = attn.cos.unsqueeze(1), attn.sin.unsqueeze(1)
    rotated, passed = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = _pairs(rotated, attn.interleaved)
    if attn.interleaved:
        turned = torch.stack((-second, first), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-second, first), dim=-1)
    return torch.cat(((rotated * cos + turned * sin).to(heads.dtype), passed), dim=-1)


def rotate_(heads: Tensor, attn: Attention) -> Tensor:
    """:func:`rotate` for ``[items, len, heads, head_dim]``, in place, with half a rotation as scratch."""
    if attn.cos is None or attn.sin is None:
        return heads
    cos, sin = attn.cos.unsqueeze(2), attn.sin.unsqueeze(2)
    rotated = heads[..., : cos.shape[-1]]
    if cos.dtype != heads.dtype:
        wide = rotate_(rotated.to(cos.dtype), attn)
        rotated.copy_(wide)
        return heads
    (first, second), (cos1, cos2), (sin1, sin2) = (_pairs(t, attn.interleaved) for t in (rotated, cos, sin))
    turned = first * sin2
    first.mul_(cos1).addcmul_(second, sin1, value=-1)
    second.mul_(cos2).add_(turned)
    return heads


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two coordinates of each rotated plane, as views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def parse(x: Tensor, arguments: tuple) -> tuple[Tensor, Attention, str, int]:
    """Undo the schema's flattening and check that everything fits.

    Raises:
        ShapeError, DtypeError: a tensor is missing or does not fit.
        InvalidOptionError: unknown strategy or norm, no workspace, a window below -1, a soft cap below 0.
    """
    context, *rest = arguments
    is_self_attention = context is None
    context = x if context is None else context
    quads, residual, rest = rest[:16], rest[16], rest[17:]
    of_x, rest = rest[: norm.ARGUMENTS_PER_NORM], rest[norm.ARGUMENTS_PER_NORM :]
    key_padding, mask, cos, sin, interleaved, *rest, strategy, workspace_bytes = rest
    norms, rest = rest[: 2 * norm.ARGUMENTS_PER_NORM], rest[2 * norm.ARGUMENTS_PER_NORM :]
    q, k, v, out = proj.group(tuple(quads))
    if q is None or k is None or v is None:
        raise ShapeError("projection 'q', 'k' or 'v'", None, "a projection")
    if mask is not None and mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    attn = Attention(q, k, v, out, key_padding, mask, cos, sin, interleaved, None, None, *rest)
    _validate(x, context, attn)
    attn = _with_norms(attn, norms, x.dtype)._replace(x_norm=norm.parse("x", tuple(of_x), 1, x.shape[-1], x.dtype))
    if attn.x_norm is not None and not is_self_attention:
        raise InvalidOptionError("x_norm", of_x[0], f"{norm.NONE!r} where there is a context")
    validate_residual(residual, x, (x.shape[0], x.shape[1], attn.out_features))
    validate_execution(strategy, workspace_bytes)
    return context, attn, strategy, workspace_bytes


def _with_norms(attn: Attention, arguments: list, dtype: torch.dtype) -> Attention:
    """The region with the norms that the arguments describe, those of the queries first."""
    of_queries, of_keys = arguments[: norm.ARGUMENTS_PER_NORM], arguments[norm.ARGUMENTS_PER_NORM :]
    return attn._replace(
        q_norm=norm.parse("q", tuple(of_queries), attn.num_heads, attn.head_dim, dtype),
        k_norm=norm.parse("k", tuple(of_keys), attn.num_kv_heads, attn.head_dim, dtype),
    )


def _validate(x: Tensor, context: Tensor, attn: Attention) -> None:
    if x.dim() != 3 or context.dim() != 3 or x.shape[0] != context.shape[0]:
        raise ShapeError("x and context", (tuple(x.shape), tuple(context.shape)), "[batch, len, features] of one batch")
    if context.dtype != x.dtype:
        raise DtypeError("context", context.dtype, x.dtype)
    proj.validate("q", attn.q, x.shape[-1], x.dtype)
    proj.validate("k", attn.k, context.shape[-1], x.dtype)
    proj.validate("v", attn.v, context.shape[-1], x.dtype)
    if attn.num_kv_heads < 1 or attn.num_heads < 1 or attn.num_heads % attn.num_kv_heads:
        raise ShapeError("num_heads", attn.num_heads, f"a multiple of num_kv_heads={attn.num_kv_heads}")
    for name, projection, heads in (("q", attn.q, attn.num_heads), ("v", attn.v, attn.num_kv_heads)):
        if proj.out_features(projection) % heads:
            raise ShapeError(f"features of {name}", proj.out_features(projection), f"a multiple of {heads} heads")
    if proj.out_features(attn.k) != attn.num_kv_heads * attn.head_dim:
        raise ShapeError("features of k", proj.out_features(attn.k), attn.num_kv_heads * attn.head_dim)
    if attn.out is not None:
        proj.validate("out", attn.out, attn.merged_width, x.dtype)
    for name, reach in (("window_left", attn.window_left), ("window_right", attn.window_right)):
        if reach < UNLIMITED:
            raise InvalidOptionError(name, reach, f"a number of keys, or {UNLIMITED} for no limit")
    if not (isfinite(attn.softcap) and attn.softcap >= 0):
        raise InvalidOptionError("softcap", attn.softcap, "a positive number, or 0 for no cap")
    _validate_masks(x, context, attn)
    _validate_rotation(x, context, attn)


def _broadcasts(size: int | torch.SymInt, whole: int | torch.SymInt) -> bool:
    """Whether a dimension is 1 or the whole; a symbol that is the whole is not asked whether it is 1."""
    return (isinstance(size, int) and size == 1) or bool(size == whole) or bool(size == 1)


def _validate_masks(x: Tensor, context: Tensor, attn: Attention) -> None:
    batch, q_len, kv_len = x.shape[0], x.shape[1], context.shape[1]
    if attn.key_padding is not None:
        if attn.key_padding.dtype != torch.bool:
            raise DtypeError("key_padding", attn.key_padding.dtype, torch.bool)
        if tuple(attn.key_padding.shape) != (batch, kv_len):
            raise ShapeError("shape of key_padding", tuple(attn.key_padding.shape), (batch, kv_len))
    if attn.mask is not None:
        if attn.mask.dtype not in (torch.bool, x.dtype):
            raise DtypeError("mask", attn.mask.dtype, f"torch.bool or {x.dtype}")
        full = (batch, attn.num_heads, q_len, kv_len)
        if attn.mask.dim() != 4 or not all(map(_broadcasts, attn.mask.shape, full)):
            raise ShapeError("shape of mask", tuple(attn.mask.shape), f"broadcastable to {full}")
    if attn.documents is not None:
        if attn.documents.is_floating_point() or attn.documents.is_complex():
            raise DtypeError("documents", attn.documents.dtype, "integers or bool")
        if q_len != kv_len:
            raise ShapeError("length of a context of packed documents", kv_len, q_len)
        if tuple(attn.documents.shape) != (batch, q_len):
            raise ShapeError("shape of documents", tuple(attn.documents.shape), (batch, q_len))


def _validate_rotation(x: Tensor, context: Tensor, attn: Attention) -> None:
    if (attn.cos is None) != (attn.sin is None):
        raise ShapeError("one of cos and sin", None, "both or neither")
    for name, table in (("cos", attn.cos), ("sin", attn.sin)):
        if table is None:
            continue
        if table.dtype not in (x.dtype, torch.float32):
            raise DtypeError(name, table.dtype, x.dtype)
        if x.shape[1] != context.shape[1]:
            raise ShapeError("length of a rotated context", context.shape[1], x.shape[1])
        if table.dim() != 3 or not _broadcasts(table.shape[0], x.shape[0]) or table.shape[1] != x.shape[1]:
            raise ShapeError(f"shape of {name}", tuple(table.shape), f"[1 or {x.shape[0]}, {x.shape[1]}, rotary_dim]")
        if table.shape[2] % 2 or not 0 < table.shape[2] <= attn.head_dim:
            raise ShapeError(f"rotary_dim of {name}", table.shape[2], f"even and at most head_dim={attn.head_dim}")
    if attn.cos is not None and attn.sin is not None:
        if attn.cos.shape != attn.sin.shape:
            raise ShapeError("shape of sin", tuple(attn.sin.shape), tuple(attn.cos.shape))
        if attn.cos.dtype != attn.sin.dtype:
            raise DtypeError("sin", attn.sin.dtype, attn.cos.dtype)
