"""Attention in rank space: what lifts keys and values out of it goes into the queries' and the output projection.

    scores = q @ (latent_k @ up_k.T).T          = (q @ up_k) @ latent_k.T
    y = linear(probs @ (latent_v @ up_v.T), w)  = linear(probs @ latent_v, w @ up_v)

Before, of each head::

    q = linear(x, wq)    k = linear(linear(c, k_down), k_up, k_bias)    v likewise    y = linear(heads, w)

After, by the same operator, its keys and values dense::

    q = linear(x, k_up.T @ wq)    k = linear(c, k_down)    v = linear(c, v_down)    y = linear(heads, w @ v_up)

Where each head has factors of its own there are as many heads of keys as before; where one pair of factors serves all
heads there is one head of keys. A bias is one more column of its ``up``, for a feature of the latent that is 1 at every
position: so a query that sees no key still gets 0 before ``y``. All products are on the weights' side and inside the
graph.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional

from ..ops.projection import Projection
from ..planner import RankSpace
from .factored import Factored
from .heads import Member
from .region import Region
from .weights import Weight

_MULTIPLE = 8
"""Heads of half precision then begin at multiples of 16 bytes, as attention kernels read them."""


def rank_space(q: Member, k: Member, v: Member, out: Factored | None) -> RankSpace | str:
    """The heads of the absorbed form, or why there is none."""
    if out is None:
        return "no output projection takes the second factor of the values"
    if q.rope is not None or k.rope is not None:
        return "a rotation stands between the keys' factors and the scores"
    if q.norm is not None or k.norm is not None:
        return "a norm stands between the keys' factors and the scores"
    spaces = {role: _spaces(member.factored) for role, member in (("k", k), ("v", v))}
    dense = [role for role, count in spaces.items() if count is None]
    if dense:
        return f"no two factors compute {' and '.join(dense)}"
    if spaces["k"] != spaces["v"]:
        return "of keys and values one has factors of each head, the other of all heads together"
    widths = [_rank(member.factored) + (member.factored.projection.up_bias is not None) for member in (k, v)]
    return RankSpace(head_dim=-(-max(widths) // _MULTIPLE) * _MULTIPLE, num_kv_heads=spaces["k"] or 1)


def absorb(space: RankSpace, region: Region) -> Region:
    """The same result by other weights; ``space`` is what :func:`rank_space` found for the region."""
    q, k, v, out = (region.members[role] for role in ("q", "k", "v", "out"))
    keys, values = (_widened(_latent(member, region.constants["num_kv_heads"]), space.head_dim) for member in (k, v))
    members = {
        "q": q._replace(projection=_into_queries(q.projection, keys.up)),
        "k": k._replace(projection=_stays(keys)),
        "v": v._replace(projection=_stays(values)),
        "out": out._replace(projection=_into_output(out.projection, values.up)),
    }
    return replace(region, members=members, constants=region.constants | {"num_kv_heads": space.num_kv_heads})


class _Latent(NamedTuple):
    """Keys or values: ``y[head] = up[head] @ (down[space] @ x + down_bias[space]) + up_bias[head]``.

    The space is the head's own, or one for all.

    Attributes:
        down: ``[spaces, rank, in_features]``.
        down_bias: ``[spaces, rank]`` or ``None``.
        up: ``[heads, dim, rank]``.
        up_bias: ``[heads, dim]`` or ``None``.
    """

    down: Weight
    down_bias: Weight | None
    up: Weight
    up_bias: Weight | None


def _spaces(member: Factored) -> int | None:
    """Rank spaces: one for each head, one for all, or ``None`` for a projection without two factors."""
    if member.of_heads is not None:
        return member.of_heads.down.shape[0]
    return None if member.projection.down is None else 1


def _rank(member: Factored) -> int:
    """Size of one of them."""
    down = member.projection.down
    if member.of_heads is not None:
        return member.of_heads.down.shape[2]
    assert down is not None
    return down.shape[0]


def _latent(member: Factored, heads: int) -> _Latent:
    down, down_bias, up, up_bias = member.projection
    bias = None if up_bias is None else Weight.call("unflatten", up_bias, 0, (heads, -1))
    if member.of_heads is not None:
        factors = (Weight.call("transpose", factor, 1, 2) for factor in member.of_heads)
        return _Latent(next(factors), None, next(factors), bias)
    assert down is not None
    lifted = Weight.call("unflatten", up, 0, (heads, -1))
    in_one = None if down_bias is None else Weight.call("unsqueeze", down_bias, 0)
    return _Latent(Weight.call("unsqueeze", down, 0), in_one, lifted, bias)


def _widened(latent: _Latent, width: int) -> _Latent:
    """With ``width`` features of rank space: a bias becomes the first new one, zeros fill the rest."""
    down, down_bias, up, up_bias = latent
    spaces, rank, _ = down.shape
    if up_bias is not None:
        up = Weight.call(torch.cat, (up, Weight.call("unsqueeze", up_bias, 2)), 2)
        before = Weight.call("new_zeros", down, (spaces, rank)) if down_bias is None else down_bias
        down_bias = Weight.call(functional.pad, before, (0, 1), "constant", 1.0)
    if down_bias is not None:
        down_bias = _padded(down_bias, (0, width - down_bias.shape[1]))
    up = _padded(up, (0, width - up.shape[2]))
    return _Latent(_padded(down, (0, 0, 0, width - rank)), down_bias, up, None)


def _padded(weight: Weight, zeros: tuple[int, ...]) -> Weight:
    """As ``functional.pad`` with zeros."""
    return Weight.call(functional.pad, weight, zeros) if any(zeros) else weight


def _stays(latent: _Latent) -> Projection[Weight]:
    """Into rank space, as a dense projection to heads of its size."""
    bias = None if latent.down_bias is None else Weight.call("flatten", latent.down_bias)
    return Projection(None, None, Weight.call("flatten", latent.down, 0, 1), bias)


def _into_queries(q: Projection[Weight], up: Weight) -> Projection[Weight]:
    """``up[head of keys].T @ q[head]``."""
    heads, dim, _ = up.shape

    def absorbed(part: Weight, equation: str) -> Weight:
        of_heads = Weight.call("unflatten", part, 0, (heads, -1, dim))
        return Weight.call("flatten", Weight.call(torch.einsum, equation, up, of_heads), 0, 2)

    weight = absorbed(q.up, "kdr,kgdi->kgri")
    return q._replace(up=weight, up_bias=q.up_bias and absorbed(q.up_bias, "kdr,kgd->kgr"))


def _into_output(out: Projection[Weight], up: Weight) -> Projection[Weight]:
    """``out[:, head] @ up[head of values]``, in the first factor of ``out`` where it has two."""
    heads, dim, _ = up.shape
    first = out.up if out.down is None else out.down
    of_heads = Weight.call("unflatten", first, 1, (heads, -1, dim))
    weight = Weight.call("flatten", Weight.call(torch.einsum, "okgd,kdr->okgr", of_heads, up), 1)
    return out._replace(up=weight) if out.down is None else out._replace(down=weight)
