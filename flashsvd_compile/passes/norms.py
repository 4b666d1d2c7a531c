"""Recognises a norm of queries or keys by its values, not by its spelling.

    before   x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight         in float32 or not, 1 + weight, ...
             weight * (x - x.mean(-1, True)) / (x.var(-1, False, True) + eps).sqrt() + bias
             rms_norm(x, (head_dim,), weight, eps), layer_norm(x, (head_dim,), weight, bias, eps)
    after    Norm(x, kind, weight, bias, eps, whole)

The operations between ``x`` and the result are collected, evaluated at random points in float64 and compared with the
norms that the operator computes; eps is solved for. What enters from elsewhere is the weight and the bias, whatever
they were computed from.
"""

from collections.abc import Iterator
from functools import partial
from itertools import permutations, product
from math import inf
from typing import NamedTuple

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from ..ops import norm as norm_ops
from .activations import CONVERSIONS, ELEMENTWISE, Elementwise, climb, evaluate
from .affine import read_affine
from .axes import Axis, Dim, Layout, extent
from .emit import emit
from .per_head import read_per_head
from .region import Deferred
from .values import example, shape_of, tensor_of, value_of
from .vocabulary import Call, read

_REDUCTIONS = {"mean", "sum", "var", "unsqueeze"}
_LIBRARY = {"layer_norm", "rms_norm"}
_OPERATIONS = ELEMENTWISE | CONVERSIONS | _REDUCTIONS | _LIBRARY
_MAX_NODES = 32
_ROWS = 2
"""Sample size of every dimension that is no feature: what mixes rows then shows."""
_SCALES = (1e-3, 1.0, 1e3, 1e-9, 1e9, 1e18, 1e36, 0.0)
"""Scales of the samples, the first for eps. Extremes show a floor or a ceiling, and zero what a padded row gives."""
_LARGE = 1e30
"""Scale of weights and biases that show a ceiling behind them."""
_SPIKE = 1e6
"""Factor of one feature over the others, which a norm makes as large as it makes any: a ceiling on its result shows."""
_TOLERANCE = 1e-8
_EPS_DIGITS = 9  # what float64 leaves of an eps of 1e-12 at the smallest scale
_NO_EPS = 1e-15


class Norm(NamedTuple):
    """One norm, as :func:`~flashsvd_compile.ops.norm.apply` computes it.

    Attributes:
        source: what is normalised.
        kind: ``"rms"`` or ``"layer"``.
        weight, bias: nodes in a shape that the operator takes, still to be made where they have another one.
        eps: added to the mean of squares.
        whole: means are over all heads' features.
        heads: number of heads that the norm needs, or ``None`` where it treats all heads alike.
        nodes: the nodes between source and result, in order of execution, the result last.
    """

    source: Node
    kind: str
    weight: Node | Deferred | None
    bias: Node | Deferred | None
    eps: float
    whole: bool
    heads: int | None
    nodes: tuple[Node, ...]


def read_norm(node: Node, layout: Layout, head_dim: Dim, dtype: torch.dtype, source: Node | None = None) -> Norm | None:
    """The norm whose result is ``node``, or ``None``.

    Args:
        node: queries or keys, or a view of them.
        layout: its axes.
        head_dim: the axes of a head's features.
        dtype: what queries and keys are multiplied in.
        source: what it may be a norm of, though it is itself computed as norms are: a sum, or a scaled tensor.

    The source has to be of that dtype; the result, the weight and the bias may be float32 besides.
    """
    frame = _frame(layout, head_dim)
    if frame is None:
        return None
    for chain in _chains(node, source):
        norm = _identify(chain, frame, dtype)
        if norm is not None:
            return norm
    return None


def source_of_norm(node: Node) -> Node | None:
    """What ``node`` is a norm of by its spelling: some mean is taken, and only vectors enter from elsewhere."""
    for chain in _chains(node):
        means = any(call is not None and call.op in _REDUCTIONS | _LIBRARY for call in map(read, chain.nodes))
        if means and all(len(_shape(other)) <= 1 for other in chain.others):
            return chain.source
    return None


class _Frame(NamedTuple):
    """Where the heads and their features are in a tensor.

    Attributes:
        sizes: sizes of a sample: features as they are, everything else short.
        is_feature: for each dimension, whether it is one of heads or of their features.
        heads_at: dimension of the heads; ``None`` where they share one with their features.
        heads, head_dim: sizes; one head where heads are rows like any other.
    """

    sizes: tuple[int, ...]
    is_feature: tuple[bool, ...]
    heads_at: int | None
    heads: int
    head_dim: int

    def by_heads(self, sample: Tensor) -> Tensor:
        """A sample as ``[..., heads, head_dim]``."""
        if self.heads_at is None:
            return sample.unflatten(-1, (self.heads, self.head_dim))
        return sample.movedim(self.heads_at, -2)

    def covers(self, call: Call) -> bool:
        """Whether a library norm is over features only, all of them in its dimensions."""
        shape = call["normalized_shape"]
        normalized = value_of(shape) if isinstance(shape, Node) else tuple(shape)
        if not isinstance(normalized, tuple):
            return False
        trailing = slice(len(self.sizes) - len(normalized), None)
        return (
            len(shape_of(call.input) or ()) == len(self.sizes)
            and all(self.is_feature[trailing])
            and normalized == self.sizes[trailing]
        )

    def accepted(self, node: Node, dtype: torch.dtype) -> tuple[int, ...] | None:
        """The shape in which the operator takes a weight or bias: of one head, or of all."""
        value = tensor_of(node)
        if value is None or value.dtype not in (dtype, torch.float32) or value.dim() > len(self.sizes):
            return None
        missing = len(self.sizes) - value.dim()
        for size, whole, is_feature in zip(value.shape, self.sizes[missing:], self.is_feature[missing:], strict=True):
            if not isinstance(size, int) or (size != 1 and not (is_feature and size == whole)):
                return None
        shapes = {self.heads * self.head_dim: (self.heads, self.head_dim), self.head_dim: (self.head_dim,)}
        return shapes.get(value.numel())


def _frame(layout: Layout, head_dim: Dim) -> _Frame | None:
    """Heads, if they can be told from rows, are a dimension of their own or stand before ``head_dim`` in the last."""
    last = layout[-1] if layout else ()
    inner = last[len(last) - len(head_dim) :]
    if not head_dim or inner != head_dim or any(not isinstance(axis, Axis) for axis in last):
        return None
    outer = last[: len(last) - len(head_dim)]
    own = [at for at, dim in enumerate(layout[:-1]) if dim and all(_is_head(axis) for axis in dim)]
    if not all(map(_is_head, outer)) or len(own) + bool(outer) > 1:
        return None
    heads = extent(layout[own[0]] if own else outer)
    dim = extent(head_dim)
    if not isinstance(heads, sympy.Integer) or not isinstance(dim, sympy.Integer):
        return None
    is_feature = tuple(at in own or at == len(layout) - 1 for at in range(len(layout)))
    pairs = zip(layout, is_feature, strict=True)
    sizes = tuple(int(extent(axes)) if feature else _ROWS for axes, feature in pairs)
    return _Frame(sizes, is_feature, own[0] if own else None, int(heads), int(dim))


def _is_head(axis: object) -> bool:
    return isinstance(axis, Axis) and axis.name.split(".")[0] == "head"


class _Chain(NamedTuple):
    """Operations on one tensor; ``others`` enter on the way."""

    source: Node
    others: tuple[Node, ...]
    nodes: tuple[Node, ...]


def _chains(node: Node, source: Node | None = None) -> Iterator[_Chain]:
    """The operations above ``node``, up to ``source``; once for each tensor of its shape at which they may begin."""

    def inputs_of(node: Node) -> list[Node] | None:
        call = read(node)
        is_leaf = node is source or call is None or call.op not in _OPERATIONS or _is_projected(node)
        return None if is_leaf else _tensors_into(node)

    found = climb(node, inputs_of, _MAX_NODES)
    if found is None or not found.nodes:
        return
    for leaf in found.leaves:
        if shape_of(leaf) != shape_of(node):
            continue
        inside = {leaf: True}
        for inner in found.nodes:  # in order of execution
            inside[inner] = any(inside.get(above, False) for above in _tensors_into(inner))
        active = tuple(inner for inner in found.nodes if inside[inner])
        entering = (above for inner in active for above in _tensors_into(inner) if not inside.get(above, False))
        yield _Chain(leaf, tuple(dict.fromkeys(entering)), active)


def _is_projected(node: Node) -> bool:
    return read_affine(node) is not None or read_per_head(node) is not None


def _tensors_into(node: Node) -> list[Node]:
    """The tensors whose values ``node`` depends on; not the one whose dtype a conversion takes."""
    call = read(node)
    inputs = [call.input] if call is not None and call.op in CONVERSIONS else node.all_input_nodes
    return [above for above in inputs if tensor_of(above) is not None]


def _identify(chain: _Chain, frame: _Frame, dtype: torch.dtype) -> Norm | None:
    if example(chain.source).dtype != dtype or len(chain.others) > 2:
        return None
    if any(example(node).dtype not in (dtype, torch.float32) for node in chain.nodes):
        return None
    shapes = {other: frame.accepted(other, dtype) for other in chain.others}
    library = [call for call in map(read, chain.nodes) if call is not None and call.op in _LIBRARY]
    if any(shape is None for shape in shapes.values()) or not all(map(frame.covers, library)):
        return None
    roles: list[Node | None] = [*chain.others, *[None] * (2 - len(chain.others))]
    wholes = (False, True) if frame.heads > 1 else (False,)
    for (weight, bias), whole, centred in product(dict.fromkeys(permutations(roles)), wholes, (False, True)):
        eps = _matches(chain, frame, weight, bias, norm_ops.Norm(centred, None, None, 0.0, whole))
        if eps is None:
            continue
        by_head = any(len(shape or ()) == 2 for shape in shapes.values())
        return Norm(
            source=chain.source,
            kind=norm_ops.LAYER if centred else norm_ops.RMS,
            weight=None if weight is None else _as(weight, shapes[weight] or ()),
            bias=None if bias is None else _as(bias, shapes[bias] or ()),
            eps=eps,
            whole=whole,
            heads=frame.heads if whole or by_head else None,
            nodes=chain.nodes,
        )
    return None


def _matches(chain: _Chain, frame: _Frame, weight: Node | None, bias: Node | None, norm: norm_ops.Norm) -> float | None:
    """The eps with which the chain is ``norm`` of its source, times ``weight``, plus ``bias``."""

    def run(x: Tensor, values: dict[Node, Tensor]) -> Tensor | None:
        leaves = {chain.source: x, **values}
        result = evaluate(Elementwise(tuple(leaves), chain.nodes), leaves)
        return frame.by_heads(result) if result is not None and result.shape == x.shape else None

    def of_heads(node: Node | None, values: dict[Node, Tensor]) -> Tensor | None:
        """As the operator reads a weight or bias."""
        return None if node is None else values[node].reshape(-1, frame.head_dim)

    given = [(node, neutral) for node, neutral in ((weight, 1.0), (bias, 0.0)) if node is not None]
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        random = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
        full = partial(torch.full, dtype=torch.float64, device="cpu")
        x = random(frame.sizes) * _SCALES[0]
        result = run(x, {node: full(_shape(node), neutral) for node, neutral in given})
        eps = _solve_eps(frame.by_heads(x), result, norm)
        if eps is None:
            return None
        for scale, gain, spike in (*((scale, 1.0, 1.0) for scale in _SCALES), (1.0, _LARGE, 1.0), (1.0, 1.0, _SPIKE)):
            x, values = random(frame.sizes) * scale, {node: random(_shape(node)) * gain for node, _ in given}
            x[..., -1] *= spike
            norm = norm._replace(weight=of_heads(weight, values), bias=of_heads(bias, values), eps=eps)
            expected, found = norm_ops.apply(frame.by_heads(x), norm), run(x, values)
            if found is None or not _agree(found, expected):
                return None
    return eps


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Up to rounding, relative to the largest number: at small scales all of them are small."""
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)


def _solve_eps(x: Tensor, result: Tensor | None, norm: norm_ops.Norm) -> float | None:
    """``1 / scale ** 2 - mean of squares`` for the first row, where the result is ``scale * (x - mean)``."""
    if result is None:
        return None
    row, scaled = ((t.flatten(-2) if norm.whole else t).flatten(0, -2)[0] for t in (x, result))
    row = row - row.mean() if norm.centred else row
    scale = (row * scaled).sum() / row.square().sum()
    eps = float(scale**-2 - row.square().mean())
    if not -_NO_EPS <= eps < inf:
        return None
    return 0.0 if eps < _NO_EPS else float(f"{eps:.{_EPS_DIGITS}g}")


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(example(node).shape)


def _as(node: Node, shape: tuple[int, ...]) -> Node | Deferred:
    """The node in another shape; a weight of all heads in one dimension stays as it is."""
    if _shape(node) in (shape, (sympy.prod(shape),)):
        return node
    return Deferred(partial(_reshaped, node, shape), (node,))


def _reshaped(node: Node, shape: tuple[int, ...], graph: Graph) -> Node:
    return emit(graph, "reshape", node, shape)
