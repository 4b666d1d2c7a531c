"""Recognises an activation by its values, not by its spelling.

GELU alone is written in a dozen ways. Instead of one pattern a spelling, the elementwise chain between two projections
is evaluated at sample points in float64 and compared with the activations that the operators know. The samples reach
far beyond the range where any of them bends, so that a clipped variant is told apart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _saved_tensors_hooks_is_enabled  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Node
from torch.fx.node import map_arg

from ..ops.activation import ACTIVATIONS
from .values import example, number_of, shape_of, tensor_of
from .vocabulary import CASTS, Call, read

ELEMENTWISE = {
    "add", "sub", "rsub", "mul", "div", "pow", "square", "neg", "tanh", "sigmoid", "erf", "exp", "abs", "sqrt", "rsqrt",
    "reciprocal", "clamp", "clamp_min", "relu", "relu6", "gelu", "silu", "elu", "leaky_relu", "softplus", "mish",
    "hardswish", "maximum",
}  # fmt: skip
CONVERSIONS = CASTS | {"clone", "contiguous"}
_IDENTITIES = CONVERSIONS | {"dropout"}
_MAX_NODES = 24
_FAR = (4, 5, 7, 10, 20, 38)
"""Powers of ten up to the largest numbers of bfloat16 and float32: a clip anywhere below shows."""
_SHIFTS = (7, 19, 43)
"""Places by which samples are shifted, so that small numbers meet large ones and other signs."""
_TOLERANCE = 1e-8  # published constants such as 0.7978845608 are rounded at the tenth digit


class Elementwise(NamedTuple):
    """A chain of elementwise operations: the tensors it reads and its nodes, in order of execution."""

    leaves: tuple[Node, ...]
    nodes: tuple[Node, ...]


class Activation(NamedTuple):
    """``name(source)``, times ``gate_source`` left linear when the MLP is gated.

    Attributes:
        name: key of :data:`~flashsvd_compile.ops.activation.ACTIVATIONS`, ``None`` for one that is not known.
        activated: the tensor the activation is applied to.
        linear: the tensor the result is multiplied with, or ``None``.
        nodes: the elementwise nodes.
    """

    name: str | None
    activated: Node
    linear: Node | None
    nodes: tuple[Node, ...]


def read_activation(node: Node, is_leaf: Callable[[Node], bool]) -> Activation | None:
    """``node`` as an elementwise function of one tensor that is no straight line, or of two, linear in one of them.

    Args:
        node: the result.
        is_leaf: whether a node is a projection's result, at which the walk has to stop.
    """
    chain = collect(node, is_leaf)
    if chain is None or not chain.nodes or len(chain.leaves) not in (1, 2):
        return None
    if len(chain.leaves) == 1:
        (source,) = chain.leaves
        name = _name(chain)
        if name is None and _is_affine(chain):
            return None
        return Activation(name if _has_the_slope_at_zero(chain, source, name) else None, source, None, chain.nodes)
    for activated, linear in (chain.leaves, chain.leaves[::-1]):
        name = _gated_name(chain, activated, linear)
        if name is not None and _has_the_slope_at_zero(chain, activated, name):
            return Activation(name, activated, linear, chain.nodes)
    return Activation(None, chain.leaves[0], chain.leaves[1], chain.nodes)


def collect(node: Node, is_leaf: Callable[[Node], bool]) -> Elementwise | None:
    """The maximal elementwise chain above ``node`` over tensors of its shape."""
    shape, tensor = shape_of(node), tensor_of(node)
    if tensor is None or not tensor.is_floating_point():
        return None

    def inputs_of(node: Node) -> list[Node] | None:
        inputs = [argument for argument in node.all_input_nodes if tensor_of(argument) is not None]
        passes = not is_leaf(node) and _is_elementwise(node) and all(shape_of(i) == shape for i in inputs)
        return inputs if passes else None

    return climb(node, inputs_of, _MAX_NODES)


def climb(node: Node, inputs_of: Callable[[Node], list[Node] | None], limit: int) -> Elementwise | None:
    """What ``node`` is computed from, up to leaves, of which ``inputs_of`` gives ``None``.

    ``None`` for more than ``limit`` operations: no deeper than that is looked.
    """
    leaves: dict[Node, None] = {}
    nodes: dict[Node, None] = {}
    entered: set[Node] = set()

    def visit(node: Node) -> bool:
        if node in nodes or node in leaves:
            return True
        inputs = inputs_of(node)
        if inputs is None:
            leaves[node] = None
            return True
        entered.add(node)
        if len(entered) > limit or not all(map(visit, inputs)):
            return False
        nodes[node] = None
        return True

    return Elementwise(tuple(leaves), tuple(nodes)) if visit(node) else None


def _is_elementwise(node: Node) -> bool:
    call = read(node)
    if call is None:
        return False
    if call.op in _IDENTITIES:
        return _keeps_precision(node)
    return call.op in ELEMENTWISE


def _keeps_precision(node: Node) -> bool:
    """A conversion may widen, and may narrow back; the chain's own result decides (see the dtype check)."""
    value = tensor_of(node)
    return value is not None and value.is_floating_point()


def evaluate(chain: Elementwise, samples: dict[Node, Tensor], differentiably: bool = False) -> Tensor | None:
    """The chain's result for given leaves, in their dtype; ``None`` when an argument is no number."""
    values: dict[Node, Any] = dict(samples)

    def load(node: Node):
        if node in values:
            return values[node].clone()  # a node of the chain may work in place
        number = number_of(node)
        if number is None:
            raise _NoNumberError
        return number

    try:
        with unset_fake_temporarily(), torch.set_grad_enabled(differentiably):
            for node in chain.nodes:
                call = read(node)
                if call is not None and call.op in _IDENTITIES:
                    values[node] = load(call.input)
                    continue
                args, kwargs = map_arg((node.args, node.kwargs), load)
                if call is not None and call.op == "rms_norm" and call.get("eps") is None:
                    args, kwargs = args[:3], {**kwargs, "eps": _default_eps(call)}
                if node.op == "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    assert callable(node.target)
                    values[node] = node.target(*args, **kwargs)
    except (_NoNumberError, RuntimeError):  # sizes of the sample may not be broadcast as those of the graph are
        return None
    return values[chain.nodes[-1]]


def _default_eps(call: Call) -> float:
    """What ``rms_norm`` adds if it is not told: it depends on a dtype that is not the samples'."""
    return torch.finfo(torch.promote_types(example(call.input).dtype, torch.float32)).eps


class _NoNumberError(Exception):
    """A symbolic scalar without a value."""


@lru_cache(maxsize=1)
def _samples() -> Tensor:
    with unset_fake_temporarily():
        near = torch.linspace(-7.03, 6.97, 57, dtype=torch.float64, device="cpu")
        far = [-1e3, -101.5, -31.7, -12.3, 11.9, 33.1, 99.5, 1e3, *(sign * 10.0**n for n in _FAR for sign in (-1, 1))]
        bends = [sign * 10.0**-n for n in range(1, 7) for sign in (-1, 1)]
        return torch.cat((near, torch.tensor([*far, *bends], dtype=torch.float64, device="cpu")))


def _name(chain: Elementwise) -> str | None:
    x = _samples()
    result = evaluate(chain, {chain.leaves[0]: x})
    return None if result is None else _known(result, x)


def _is_affine(chain: Elementwise) -> bool:
    """Whether the chain scales and shifts, or does nothing: no activation stands between two projections."""
    x = _samples()
    y = evaluate(chain, {chain.leaves[0]: x})
    if y is None or y.shape != x.shape:
        return False
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return torch.allclose(y, y[0] + slope * (x - x[0]), rtol=_TOLERANCE, atol=_TOLERANCE)


def _gated_name(chain: Elementwise, activated: Node, linear: Node) -> str | None:
    """The activation when the chain is ``act(activated) * linear``, however small or large either is."""
    x = _samples()
    names = set()
    for other in (x.flip(0), *(x.roll(shift) for shift in _SHIFTS)):
        result = evaluate(chain, {activated: x, linear: other})
        names.add(None if result is None else _known(result / other, x))
    return names.pop() if len(names) == 1 else None


def _has_the_slope_at_zero(chain: Elementwise, activated: Node, name: str | None) -> bool:
    """Whether the chain has the activation's slope at 0, too, or nobody asks for one.

    There ``clamp(min=0)`` has 1 and ``(x + x.abs()) / 2`` a half where ``relu`` has 0, and all that is padded may be 0.
    """
    tensor = tensor_of(activated)
    if name is None or tensor is None or not tensor.requires_grad:
        return True
    with unset_fake_temporarily(), torch.enable_grad(), _without_saved_tensors_hooks():
        zero = torch.zeros(1, dtype=torch.float64, device="cpu", requires_grad=True)
        others = {leaf: torch.ones_like(zero) for leaf in chain.leaves if leaf is not activated}
        results = evaluate(chain, {activated: zero, **others}, differentiably=True), ACTIVATIONS[name](zero)
        slopes = [torch.autograd.grad(result, zero)[0] for result in results if result is not None]
        return torch.allclose(slopes[0], slopes[-1], rtol=_TOLERANCE, atol=_TOLERANCE)


@contextmanager
def _without_saved_tensors_hooks() -> Iterator[None]:
    """Keep the user's hooks out of what is differentiated here: those of a checkpoint count what they are given."""
    if not _saved_tensors_hooks_is_enabled():  # then there are none
        yield
        return
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def _known(values: Tensor, x: Tensor) -> str | None:
    with unset_fake_temporarily(), torch.no_grad():
        for name, activation in ACTIVATIONS.items():
            if values.shape == x.shape and torch.allclose(values, activation(x), rtol=_TOLERANCE, atol=_TOLERANCE):
                return name
    return None
