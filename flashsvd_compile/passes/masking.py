"""How scores are masked, and what the attention operator is told about it.

scaled_dot_product_attention(q, k, v, attn_mask=mask)
softmax(scores + mask)
softmax(scores.masked_fill(forbidden, -inf))
softmax(where(visible, scores, -inf))
softmax(max(any of these, finfo.min))
"""

from functools import partial
from math import inf
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Graph, Node

from ..ops.attention_region import UNLIMITED
from ..report import RefusalReason
from .emit import emit
from .factored import Obstacle
from .masks import MaskReading, ReadMask, level_of
from .mutation import is_overwritten
from .region import Deferred
from .values import example, number_of, shape_of, tensor_of
from .vocabulary import read

_CERTAINLY_ZERO = -1e9
"""A score this low has no weight next to any score that a model computes."""


class Mask(NamedTuple):
    """One restriction of the scores.

    Attributes:
        node: a boolean or additive mask as ``scaled_dot_product_attention`` takes it; a condition if there is a fill.
        fill: what replaces the scores of keys that must not be seen, or ``None``.
        inverted: the condition is true where a key must not be seen.
        floored: masked scores are raised to the least finite number, so that a query that may see no key attends to
            all of them evenly.
        heads: with them, the first of three dimensions is that of batch items by heads, or of size 1.
        leading: dimensions of the scores where they are restricted, but for queries and keys; ``None`` where they are
            batch and heads.
    """

    node: Node
    fill: float | None = None
    inverted: bool = False
    floored: bool = False
    heads: int | None = None
    leading: tuple[sympy.Expr, ...] | None = None

    def fits(self, batch: sympy.Expr, heads: sympy.Expr) -> bool:
        """Whether it says the same of ``[batch, heads, queries, keys]``."""
        own = (shape_of(self.node) or ())[:-2]
        if self.leading is None or self.heads is not None:
            return True
        return len(own) <= 2 and (all(size == 1 for size in own) or self.leading == (batch, heads))

    @property
    def visible(self) -> Node | None:
        """The graph's boolean node that is true where a key is visible, if there is one."""
        if not self.inverted:
            return self.node
        call = read(self.node)
        if call is None or not _is_boolean(call.input):
            return None
        is_negation = call.op == "logical_not" or (call.op == "eq" and number_of(call["other"]) == 0)
        return call.input if is_negation else None


def read_fill(node: Node) -> tuple[Node, Mask] | None:
    """``node`` as scores with some of them replaced by a low number: ``(scores, mask)``."""
    call = read(node)
    if call is None:
        return None
    if call.op == "masked_fill":
        scores, condition, fill, inverted = call.input, call["mask"], _number(call["value"]), True
    elif call.op == "where" and node.op == "call_function":
        scores, condition, fill, inverted = call["input"], call["condition"], _number(call["other"]), False
    else:
        return None
    if fill is None or fill > _CERTAINLY_ZERO or not _is_boolean(condition) or shape_of(scores) != shape_of(node):
        return None
    return scores, Mask(condition, fill, inverted)


def read_floor(node: Node) -> Node | None:
    """The scores behind ``max(scores, finfo.min)``, which matters to masked scores only."""
    call, result = read(node), tensor_of(node)
    if call is None or result is None or call.op not in ("maximum", "max", "clamp", "clamp_min"):
        return None
    if call.get("max") is not None or shape_of(call.input) != shape_of(node):
        return None
    bound = call.get("other", call.get("min"))
    is_maximum = call.op in ("clamp", "clamp_min") or tensor_of(bound) is not None
    floor = _number(bound)
    return call.input if is_maximum and floor is not None and -inf < floor <= torch.finfo(result.dtype).min else None


def _number(value: object) -> float | None:
    """A number, also one held by a tensor of no dimension that the graph makes and does not write to."""
    number = number_of(value)
    call = read(value) if number is None else None
    if call is None or shape_of(value) != ():
        return number
    assert isinstance(value, Node)
    if is_overwritten(value):
        return None
    return number_of(call.get("fill_value", call.get("data")))


def _is_boolean(node: object) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype == torch.bool


class Scores(NamedTuple):
    """What decides whether a mask can be told to the operator.

    Attributes:
        x: the operator's input, whose first dimension is the batch.
        dtype: in which queries and keys are multiplied.
        square: there are as many keys as queries.
        casts_mask: the core casts its mask to that dtype, as ``scaled_dot_product_attention`` does under autocast.
    """

    x: Node
    dtype: torch.dtype
    square: bool
    casts_mask: bool


def mask_arguments(masks: tuple[Mask, ...], scores: Scores, read_mask: ReadMask) -> dict[str, Any] | Obstacle:
    """The operator's arguments for all masks together, the outermost first."""
    if _may_hide_a_row_jointly(masks, scores, read_mask):
        return _as_one(masks, scores)
    arguments, tensors = dict[str, Any](), list[Mask]()
    for mask in masks:
        arguments_of = _arguments if mask.fill is None else _arguments_of_fill
        found = arguments_of(mask, scores, read_mask)
        if isinstance(found, Obstacle):
            return found
        twice = arguments.keys() & found.keys()
        if twice and mask.floored != masks[0].floored:
            return _as_one(masks, scores)
        if twice - {"mask"}:
            return _unknown(mask, "is one of two masks that cannot be told to the operator together")
        if twice:
            replaces = any(map(_fills_finitely, tensors))
            if replaces and len(tensors) > 1:
                return _as_one(masks, scores)
            found["mask"] = _together(arguments["mask"], found["mask"], mask.floored, replaces)
        if "mask" in found:
            tensors.append(mask)
        arguments |= found
    return arguments


def _fills_finitely(mask: Mask) -> bool:
    """Whether masked scores are replaced by a finite number, or raised to one."""
    return mask.fill is not None and (mask.floored or mask.fill != -inf)


def _may_hide_a_row_jointly(masks: tuple[Mask, ...], scores: Scores, read_mask: ReadMask) -> bool:
    """Whether two masks together may hide every key of a query while one of them uses a finite level.

    Softmax is then uniform over the least negative scores, which may be those of keys that only one mask hides, and
    the later of two masks replaces what the earlier put. So no mask of a finite level becomes structure beside one that
    may hide a query's own key: they are merged into one additive tensor (:func:`_as_one`).
    """
    if len(masks) < 2:
        return False
    effects = [_MaskEffect.of(mask, scores, read_mask) for mask in masks if not _is_bias(mask)]
    if len(effects) < 2 or not any(effect.finite for effect in effects):
        return False
    all_see_themselves = all(effect.sees_own_key for effect in effects)
    finite_structure = any(effect.finite and effect.is_structure for effect in effects)
    tensors = [at for at, effect in enumerate(effects) if not effect.is_structure]
    fills = [at for at in tensors if effects[at].finite and effects[at].replaces_scores]
    fills_around_others = bool(fills) and fills[0] < len(effects) - 1  # and replaces what they put, -inf as well
    fills_beside_a_tensor = bool(fills) and len(tensors) > 1
    return fills_around_others or fills_beside_a_tensor or (finite_structure and not all_see_themselves)


class _MaskEffect(NamedTuple):
    """What one of several masks does to the scores.

    Attributes:
        finite: masked scores are finite numbers, as far as is known.
        is_structure: the operator is told its structure (padding, a window), not the tensor.
        sees_own_key: each query sees the key at its own position.
        replaces_scores: it fills scores instead of adding to them.
    """

    finite: bool
    is_structure: bool
    sees_own_key: bool
    replaces_scores: bool

    @classmethod
    def of(cls, mask: Mask, scores: Scores, read_mask: ReadMask) -> "_MaskEffect":
        fills, reading = mask.fill is not None, _reading_of(mask, read_mask)
        sees_own_key = reading.residual is None and not reading.key_paddings and scores.square
        level = mask.fill if fills else -inf if _is_boolean(mask.node) else level_of(mask.node)
        finite = level != -inf or mask.floored
        is_structure = sees_own_key if fills and finite else reading.residual is None
        return cls(finite, is_structure, sees_own_key, fills)


def _reading_of(mask: Mask, read_mask: ReadMask) -> MaskReading:
    """What a mask says of which keys are visible."""
    if mask.fill is None:
        return read_mask(mask.node, mask.floored)
    if mask.visible is None:
        return MaskReading(residual=mask.node, reason="no rule explains where it fills scores")
    return read_mask(mask.visible, False)


def why_tensors_stay(masks: tuple[Mask, ...], read_mask: ReadMask) -> str:
    """Why masks are not told to the operator as structure; empty where nothing is known of it."""
    reasons = (_reading_of(mask, read_mask).reason for mask in masks if not _is_bias(mask))
    return "; ".join(dict.fromkeys(f"its mask stays a tensor: {reason}" for reason in reasons if reason))


def _is_bias(mask: Mask) -> bool:
    """Whether numbers of each head's own are added, which no mask has, at no known level."""
    per_head = mask.heads is not None or (shape_of(mask.node) or ())[-3:-2] not in ((), (1,))
    return mask.fill is None and per_head and level_of(mask.node) is None


def _as_one(masks: tuple[Mask, ...], scores: Scores) -> dict[str, Any] | Obstacle:
    """One additive mask for all: what they make of scores of 0, next to which any other scores are rounded away."""
    x = tensor_of(scores.x)
    least = torch.finfo(scores.dtype).min
    for mask in masks:
        value = tensor_of(mask.node)
        adds = mask.fill is None and value is not None and value.dtype == scores.dtype
        if mask.heads is not None or not (adds or (mask.fill is not None and mask.fill <= least)):
            return _unknown(mask, "is one of several masks by which a query may see no key")
    if x is None or x.dtype != scores.dtype or scores.dtype == torch.float16:
        return _unknown(masks[0], f"is one of several masks of scores of {scores.dtype}, which round no score away")
    return {"mask": Deferred(partial(_replayed, masks, scores.dtype), tuple(mask.node for mask in masks))}


def _replayed(masks: tuple[Mask, ...], dtype: torch.dtype, graph: Graph) -> Node:
    total: Node | None = None
    for at, mask in reversed(list(enumerate(masks))):
        if mask.fill is None:
            total = mask.node if total is None else emit(graph, "add", total, mask.node)
        else:
            hidden = mask.node if mask.inverted else emit(graph, "logical_not", mask.node)
            start = emit(graph, "mul", emit(graph, "to", hidden, dtype), 0.0) if total is None else total
            fill = mask.fill if mask.fill == -inf else max(mask.fill, torch.finfo(dtype).min)
            total = emit(graph, "masked_fill", start, hidden, fill)
        if mask.floored and not any(outer.floored for outer in masks[:at]):
            total = _raised(total, graph)
    assert total is not None
    return total


def _together(outer: Node | Deferred, inner: Node | Deferred, floored: bool, replaces: bool) -> Deferred:
    """Two masks, boolean or additive, as one. The outer replaces what the inner put, or both are added up."""
    leaves = [part.leaves if isinstance(part, Deferred) else (part,) for part in (inner, outer)]
    return Deferred(partial(_combined, inner, outer, floored, replaces), (*leaves[0], *leaves[1]))


def _combined(inner: Node | Deferred, outer: Node | Deferred, floored: bool, replaces: bool, graph: Graph) -> Node:
    parts = [part.build(graph) if isinstance(part, Deferred) else part for part in (inner, outer)]
    if replaces and not any(map(_is_boolean, parts)):
        total = emit(graph, torch.where, emit(graph, "ne", parts[1], 0), parts[1], parts[0])
        return _raised(total, graph) if floored else total
    parts.sort(key=_is_boolean)
    if _is_boolean(parts[0]):
        return emit(graph, "logical_and", *parts)
    if _is_boolean(parts[1]):
        return emit(graph, torch.where, parts[1], parts[0], emit(graph, "new_full", parts[0], (), -inf))
    total = emit(graph, "add", *parts)
    return _raised(total, graph) if floored else total


def _arguments(mask: Mask, scores: Scores, read_mask: ReadMask) -> dict[str, Any] | Obstacle:
    value, arguments = tensor_of(mask.node), _structure(_reading_of(mask, read_mask), scores.x)
    if "mask" in arguments and mask.floored:
        return _floored(mask, scores)
    other_dtype = value is not None and value.dtype not in (torch.bool, scores.dtype)
    if "mask" in arguments and other_dtype and not scores.casts_mask:
        narrow = _narrowed(mask, scores.dtype)
        return _unknown(mask, f"is not of the queries' dtype {scores.dtype}") if narrow is None else {"mask": narrow}
    of_items = (shape_of(mask.node) or ())[:-2] not in ((), (1,))
    if "mask" in arguments and mask.heads is not None and of_items:
        arguments["mask"] = _call("unflatten", mask.node, 0, (-1, mask.heads))
    return arguments


def _narrowed(mask: Mask, dtype: torch.dtype) -> Node | Deferred | None:
    """A mask that autocast adds to narrower scores, such that a cast to their ``dtype`` leaves its meaning.

    A level of -inf does; so does the least number of bfloat16, next to which scores vanish as next to that of float32.
    """
    value, level = tensor_of(mask.node), level_of(mask.node)
    if value is None or value.dtype != torch.float32 or level is None or mask.heads is not None:
        return None
    if level == -inf:
        return mask.node
    if dtype != torch.bfloat16 or level > torch.finfo(value.dtype).min:
        return None
    return _call("clamp_min", mask.node, torch.finfo(dtype).min)


def _floored(mask: Mask, scores: Scores) -> dict[str, Any] | Obstacle:
    """The mask raised instead of the scores: next to the least number a score is rounded away, but for half floats."""
    value = tensor_of(mask.node)
    if value is None or value.dtype != scores.dtype or value.dtype == torch.float16 or mask.heads is not None:
        return _unknown(mask, f"is added to scores of {scores.dtype} that are then raised to the least number")
    return {"mask": Deferred(partial(_raised, mask.node), (mask.node,))}


def _raised(node: Node, graph: Graph) -> Node:
    return emit(graph, "clamp_min", node, torch.finfo(example(node).dtype).min)


def _arguments_of_fill(mask: Mask, scores: Scores, read_mask: ReadMask) -> dict[str, Any] | Obstacle:
    fill, reading = mask.fill, _reading_of(mask, read_mask)
    assert fill is not None
    if _fills_finitely(mask):
        fill = max(fill, torch.finfo(scores.dtype).min)  # of scores that are wider than queries and keys
    if fill == -inf:
        return {"mask": _call("logical_not", mask.node)} if mask.visible is None else _structure(reading, scores.x)
    if scores.square and reading.residual is None and not reading.key_paddings:  # every query sees at least itself
        return _structure(reading, scores.x)
    x = tensor_of(scores.x)
    too_high = scores.dtype == torch.float16 or fill > torch.finfo(scores.dtype).min
    if x is None or x.dtype != scores.dtype or too_high:
        return _unknown(mask, f"puts {fill:g} for scores, where a row may be masked completely")
    return {"mask": Deferred(partial(_additive, mask, fill, scores.dtype), (mask.node,))}


def _structure(reading: MaskReading, x: Node) -> dict[str, Any]:
    """What was understood, by the operator's names; the mask as it is where nothing was."""
    if reading.residual is not None:
        return {"mask": reading.residual}
    sides = {"window_left": reading.window_left, "window_right": reading.window_right}
    arguments: dict[str, Any] = {name: side for name, side in sides.items() if side != UNLIMITED}
    if reading.key_paddings:
        nodes = tuple(padding.node for padding in reading.key_paddings)
        arguments["key_padding"] = Deferred(partial(_key_padding, reading, x), nodes)
    if reading.documents is not None:
        arguments["documents"] = Deferred(partial(reading.documents.build, query=x), (reading.documents.node,))
    return arguments


def _key_padding(reading: MaskReading, x: Node, graph: Graph) -> Node:
    padding = reading.materialize(graph, x)
    assert padding is not None
    return padding


def _call(method: str, node: Node, *arguments: Any) -> Deferred:
    return Deferred(lambda graph: emit(graph, method, node, *arguments), (node,))


def _additive(mask: Mask, fill: float, dtype: torch.dtype, graph: Graph) -> Node:
    """0 where a key is visible, else the fill: so low that adding a score to it changes nothing."""
    forbidden = mask.node if mask.inverted else emit(graph, "logical_not", mask.node)
    return emit(graph, "mul", emit(graph, "to", forbidden, dtype), fill)


def _unknown(mask: Mask, sentence: str) -> Obstacle:
    return Obstacle(RefusalReason.UNKNOWN_MASK, f"{mask.node.name!r} {sentence}")
