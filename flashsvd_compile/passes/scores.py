"""Reads the core of an attention: what the queries, keys and values are, and how the scores are treated.

Serves ``scaled_dot_product_attention`` and its spelled-out form, by matrix products or ``einsum``::

    probs = softmax(q @ k.transpose(-1, -2) * scale + mask, dim=-1)
    heads = probs @ v

A soft cap, ``cap * tanh(scores / cap)``, may stand between the scale and the mask.
"""

from itertools import islice
from math import sqrt
from typing import NamedTuple

import torch
from torch.fx import Node

from ..report import RefusalReason
from .affine import read_affine, read_scaling
from .ancestors import ancestors
from .axes import Axis, Layout, extent, named
from .factored import Obstacle, unsupported
from .masking import Mask, read_fill, read_floor
from .products import Product, read_biased_product, read_product
from .values import example, number_of, shape_of, tensor_of
from .views import Regroup, layout_of, read_view, trace
from .vocabulary import CASTS, Call, is_call, read


class Operand(NamedTuple):
    """One of q, k, v as the core reads it, its axes named batch, head, query or key, dim or value."""

    node: Node
    layout: Layout


class Core(NamedTuple):
    """``softmax(scale * q @ k.T + mask) @ v``, or ``softmax(softcap * tanh(scale * q @ k.T / softcap) + mask) @ v``.

    Attributes:
        q, k, v: operands with their axes named.
        masks: what restricts the scores.
        causal: query ``i`` sees key ``j`` only when ``j <= i``.
        scale: factor on the scores.
        softcap: what the scores stay below in magnitude, or 0 for no cap.
        dtype: in which queries and keys are multiplied; autocast casts wider ones to it.
        result: the heads' outputs with their axes named.
        nodes: the nodes between operands and result, the result last.
    """

    q: Operand
    k: Operand
    v: Operand
    masks: tuple[Mask, ...]
    causal: bool
    scale: float
    softcap: float
    dtype: torch.dtype
    result: Operand
    nodes: tuple[Node, ...]


def read_core(node: Node) -> Core | Obstacle | None:
    """The attention core whose concatenation of heads is still to come, or why it cannot be read."""
    if node.target is torch.ops.higher_order.flex_attention:
        return unsupported(f"the masks and scores of {node.name!r} are programs, which flex_attention compiles itself")
    call = read(node)
    if call is None:
        return None
    if call.op == "scaled_dot_product_attention":
        return _sdpa(call, node)
    product = read_product(node)
    return None if product is None else _spelled_out(product, node)


def _sdpa(call: Call, node: Node) -> Core | Obstacle:
    q = _operand(call["query"], ("batch", "head", "query", "dim"))
    k = _operand(call["key"], ("batch", "head", "key", "dim"))
    v = _operand(call["value"], ("batch", "head", "key", "value"))
    result = _operand(node, ("batch", "head", "query", "value"))
    if q is None or k is None or v is None or result is None:
        return unsupported(f"q, k, v of {node.name!r} are not [batch, heads, len, dim]")
    if number_of(call.get("dropout_p", 0.0)) != 0.0:
        return Obstacle(RefusalReason.LIVE_DROPOUT, f"the dropout of {node.name!r} is not off")
    causal, scale = call.get("is_causal", False), call.get("scale")
    if not isinstance(causal, bool):
        return unsupported(f"whether {node.name!r} is causal is decided at run time")
    factor = default_scale(q.node) if scale is None else number_of(scale)
    if factor is None:
        return unsupported(f"the scale of {node.name!r} is not a constant")
    mask = call.get("attn_mask")
    masks = () if mask is None else (Mask(mask),)
    return Core(q, k, v, masks, causal, factor, 0.0, example(node).dtype, result, (node,))


def default_scale(query: Node) -> float | None:
    """``1 / sqrt(head_dim)``."""
    shape = shape_of(query)
    return 1 / sqrt(int(shape[-1])) if shape is not None and shape[-1].is_Integer else None


def _operand(node: object, axes: tuple[str, ...]) -> Operand | None:
    layout = layout_of(axes, node) if isinstance(node, Node) else None
    return Operand(node, layout) if isinstance(node, Node) and layout is not None else None


def _spelled_out(product: Product, node: Node) -> Core | Obstacle | None:
    """``softmax(...) @ v``."""
    probabilities, after = _skip(product.left)
    softmax = read(probabilities)
    if softmax is None or softmax.op != "softmax" or not isinstance(softmax.input, Node):
        part = read_view(probabilities)
        if part is not None and is_call(part.source, "softmax"):
            return unsupported(f"{probabilities.name!r} is part of a softmax, over keys and something else (a sink)")
        if read_affine(node) is None and _is_made_of_scores(product.left):
            return unsupported(f"{node.name!r} weights values by more than a softmax, or by something else")
        return None
    shape = shape_of(softmax.input)
    if shape is None or softmax.get("dim") not in (-1, len(shape) - 1):
        return unsupported(f"{probabilities.name!r} is not over the keys")
    scores = _read_scores(softmax.input)
    if isinstance(scores, Obstacle):
        return scores
    operands = _operands(scores.product, product, node)
    if operands is None:
        return unsupported(f"the axes of {node.name!r} are not batch, heads, queries and keys")
    q, k, v, result = operands
    items = extent(named(q.layout, "batch")), extent(named(q.layout, "head"))
    if not all(mask.fits(*items) for mask in scores.masks):
        return unsupported(f"a mask of {probabilities.name!r} is not of batch, heads, queries and keys")
    dtype = _multiplied_in(scores.nodes[0], q.node)
    nodes = (*scores.nodes, probabilities, *after, node)
    return Core(q, k, v, scores.masks, False, scores.scale, scores.softcap, dtype, result, nodes)


_STEPS_FROM_SCORES = 12
"""Nodes above the weights of values among which a softmax, or the scores themselves, are looked for."""


def _is_made_of_scores(weights: Node) -> bool:
    """Whether a softmax or a product of two activations is a few steps above, all of the shape of the weights."""
    shape = shape_of(weights)
    alike = (n for n in ancestors([weights], through=lambda n: shape_of(n) == shape) if shape_of(n) == shape)
    return any(
        is_call(node, "softmax") or (read_product(node) is not None and read_affine(node) is None)
        for node in (weights, *islice(alike, _STEPS_FROM_SCORES))
    )


def _multiplied_in(product: Node, queries: Node) -> torch.dtype:
    """The narrower dtype of a product and its queries: autocast narrows these, ``out_dtype`` widens that."""
    return min((example(queries).dtype, example(product).dtype), key=lambda dtype: dtype.itemsize)


def _operands(scores: Product, weighted: Product, node: Node) -> tuple[Operand, Operand, Operand, Operand] | None:
    """Name the axes of q, k, v and of the result."""
    if scores.letters[-1:] != scores.of_right:
        scores = scores.swapped()
    if scores.letters[-2:] != scores.of_left + scores.of_right:
        return None
    if weighted.left_letters[-2:] != weighted.of_left + weighted.summed:
        return None
    names = {scores.of_left: "query", scores.of_right: "key", scores.summed: "dim"}
    values = {weighted.of_left: "query", weighted.summed: "key", weighted.of_right: "value"}
    items = _items(scores)
    shared = "".join(letter for letter in weighted.left_letters if letter in weighted.shared)  # as the scores have them
    found = (
        _named(scores.left, scores.left_letters, names, scores.shared, items),
        _named(scores.right, scores.right_letters, names, scores.shared, items),
        _named(weighted.right, weighted.right_letters, values, shared, items),
        _named(node, weighted.letters, values, shared, items),
    )
    q, k, v, result = found
    return None if q is None or k is None or v is None or result is None else (q, k, v, result)


def _named(node: Node, letters: str, names: dict[str, str], shared: str, items: tuple[Axis, ...]) -> Operand | None:
    """A factor whose letters have names; shared ones are batch and heads, or both in one dimension."""
    if len(shared) == 2:
        return _operand(node, tuple((names | {shared[0]: "batch", shared[1]: "head"})[letter] for letter in letters))
    operand = _operand(node, tuple((names | {shared: "item"})[letter] for letter in letters))
    if operand is None:
        return None
    layout = tuple(items if dim and dim[0].name == "item" else dim for dim in operand.layout)  # pyright: ignore
    return Operand(node, layout)


def _items(scores: Product) -> tuple[Axis, ...]:
    """The batch and head axes that ``[batch * heads, len, dim]`` operands have in one dimension."""
    if len(scores.shared) == 2:
        return ()
    factors = (scores.left, scores.left_letters), (scores.right, scores.right_letters)
    found = [_items_of(node, letters, scores.shared) for node, letters in factors]
    return next((items for items in found if items[-1:] and items[-1].name == "head"), found[0])


def _items_of(node: Node, letters: str, shared: str) -> tuple[Axis, ...]:
    """The same as far as the views behind one operand tell; its items are batch items of one head if they do not."""
    layout = layout_of(tuple("item" if letter == shared else letter for letter in letters), node)
    if layout is None:
        return ()
    *rows, features = trace(node, layout).layout
    heads = [axis for axis in features if isinstance(axis, Axis) and axis.name.startswith("item")]
    others = [axis for dim in rows for axis in dim if isinstance(axis, Axis) and axis.name.startswith("item")]
    if not heads and len(others) == 2:
        heads = [others.pop()]
    batch, head = extent(tuple(others)), extent(tuple(heads))
    return tuple(Axis(name, size) for name, size in (("batch", batch), ("head", head)) if size != 1)


class _Scores(NamedTuple):
    """``product * scale``, capped, masked."""

    product: Product
    scale: float
    softcap: float
    masks: tuple[Mask, ...]
    nodes: tuple[Node, ...]


def _read_scores(node: Node) -> _Scores | Obstacle:
    """Walk from the softmax's input to ``q @ k.T``.

    A factor ``a`` behind a ``tanh`` and one ``b`` before it cap ``a * b * product`` at ``a``.
    """
    scale, softcap, masks, nodes, floored = 1.0, 0.0, (), [], False
    while True:
        node, passed = _skip(node)
        nodes[:0] = passed
        product, call = read_product(node), read(node)
        nodes.insert(0, node)
        if product is not None:
            return _Scores(product, scale * product.scale, softcap, masks, tuple(nodes))
        scaled = scale != 1.0 or bool(softcap)
        biased = None if scaled else read_biased_product(node)
        if biased is not None:
            return _with_bias(node, *biased, masks, tuple(nodes), floored)
        scaling = read_scaling(node)
        if scaling is not None:
            node, scale = scaling[0], scale * scaling[1]
            continue
        if call is not None and call.op == "tanh" and not softcap and scale > 0:
            node, softcap = call.input, scale
            continue
        raised = None if scaled else read_floor(node)
        if raised is not None:
            node, floored = raised, True
            continue
        masked = None if scaled else _read_addition(node) or read_fill(node)
        if masked is None:
            return unsupported(f"scores pass through {node.name!r}, which is not understood")
        node, mask = masked
        leading = (shape_of(node) or ())[:-2]
        masks = (*masks, mask._replace(floored=floored, leading=leading))


def _with_bias(
    node: Node, product: Product, bias: Node, masks: tuple[Mask, ...], nodes: tuple[Node, ...], floored: bool
) -> _Scores | Obstacle:
    """``baddbmm(bias, q, k.T, alpha=scale)``, whose items are batch items by heads."""
    heads = next((axis.size for axis in _items(product) if axis.name == "head"), None)
    before, after = tensor_of(bias), tensor_of(node)
    if heads is None or not heads.is_Integer or before is None or after is None or before.dtype != after.dtype:
        return unsupported(f"the heads that {bias.name!r} is added to are not known")
    masks = (*masks, Mask(bias, floored=floored, heads=int(heads)))
    return _Scores(product, product.scale, 0.0, masks, nodes)


def _read_addition(node: Node) -> tuple[Node, Mask] | None:
    """``scores + mask``: the addend that leads to a product, and the other one, of the same dtype and no larger."""
    call, result = read(node), tensor_of(node)
    if call is None or call.op != "add" or number_of(call.get("alpha", 1)) != 1 or result is None:
        return None
    for scores, mask in ((call.input, call["other"]), (call["other"], call.input)):
        shape, masked = shape_of(scores), tensor_of(mask)
        if shape is None or masked is None or not _leads_to_product(scores):
            continue
        fits = shape == shape_of(node) and masked.dtype == result.dtype
        return (scores, Mask(mask)) if fits else None
    return None


def _leads_to_product(node: Node) -> bool:
    node, _ = _skip(node)
    if read_product(node) is not None or read_biased_product(node) is not None:
        return True
    call = read(node)
    if call is not None and call.op == "tanh":
        return _leads_to_product(call.input)
    before = read_scaling(node) or _read_addition(node) or read_fill(node)
    return before is not None and _leads_to_product(before[0])


_CONVERSIONS = CASTS | {"dropout", "contiguous", "clone"}


def _skip(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """Past casts, dropout and views that leave the last two dimensions alone; ``(node, nodes passed, in order)``."""
    passed: list[Node] = []
    while (source := _before(node)) is not None:
        passed.insert(0, node)
        node = source
    return node, tuple(passed)


def _before(node: Node) -> Node | None:
    call, view = read(node), read_view(node)
    if call is None:
        return None
    if view is not None and all(isinstance(step, Regroup) for step in view.steps):
        before, after = shape_of(view.source), shape_of(node)
        return view.source if before is not None and after is not None and before[-2:] == after[-2:] else None
    before, after = tensor_of(call.input), tensor_of(node)
    floating = before is not None and after is not None and before.is_floating_point() and after.is_floating_point()
    return call.input if call.op in _CONVERSIONS and floating else None
