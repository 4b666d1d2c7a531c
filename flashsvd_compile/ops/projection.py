"""An affine map in factored form, the one currency of passes and operators."""

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import DtypeError, ShapeError

T = TypeVar("T")


class Projection(NamedTuple, Generic[T]):
    """``y = up(down(x) + down_bias) + up_bias``; without ``down`` a dense ``y = up(x) + up_bias``.

    Generic over what stands for a tensor: ``passes.weights.Weight`` in the passes, ``Tensor`` in the operators.

    Attributes:
        down: ``[rank, in_features]``, any strides, or ``None`` for a dense projection.
        down_bias: ``[rank]`` or ``None``.
        up: ``[out_features, rank]`` (``[out_features, in_features]`` when dense), any strides.
        up_bias: ``[out_features]`` or ``None``.
    """

    down: T | None
    down_bias: T | None
    up: T
    up_bias: T | None


ARGUMENTS_PER_PROJECTION = len(Projection._fields)


def schema_of(role: str) -> str:
    """Schema fragment of one projection: four optional tensors named after its role."""
    return ", ".join(f"Tensor? {name}=None" for name in argument_names(role))


def argument_names(role: str) -> tuple[str, ...]:
    """``("q_down", "q_down_bias", "q_up", "q_up_bias")`` for role ``"q"``."""
    return tuple(f"{role}_{field}" for field in Projection._fields)


def group(arguments: tuple[Tensor | None, ...]) -> list[Projection[Tensor] | None]:
    """Undo the flattening of the schema: four arguments become a projection, an absent ``up`` becomes ``None``."""
    size = ARGUMENTS_PER_PROJECTION
    quads = (arguments[start : start + size] for start in range(0, len(arguments), size))
    return [None if up is None else Projection(down, down_bias, up, up_bias) for down, down_bias, up, up_bias in quads]


def in_features(projection: Projection[Tensor]) -> int:
    """Size of the last dimension of the projection's input."""
    return (projection.up if projection.down is None else projection.down).shape[1]


def out_features(projection: Projection[Tensor]) -> int:
    """Size of the last dimension of the projection's result."""
    return projection.up.shape[0]


def rank(projection: Projection[Tensor]) -> int:
    """Columns of rank-space intermediate a row of input needs; 0 when dense."""
    return 0 if projection.down is None else projection.down.shape[0]


def apply(x: Tensor, projection: Projection[Tensor]) -> Tensor:
    """The specification: ``[..., in_features]`` to ``[..., out_features]`` in plain PyTorch."""
    if projection.down is not None:
        x = torch.nn.functional.linear(x, projection.down, projection.down_bias)
    return torch.nn.functional.linear(x, projection.up, projection.up_bias)


def costs_more_than_dense(projection: Projection[Tensor]) -> bool:
    """Whether two factors cost at least as much as their product: ``rank * (in + out) >= in * out``."""
    n, m = in_features(projection), out_features(projection)
    return projection.down is not None and rank(projection) * (m + n) >= m * n


def merge_if_cheaper(projection: Projection[Tensor]) -> Projection[Tensor]:
    """The dense projection, of weight ``up @ down``, where the factors are :func:`costs_more_than_dense`."""
    if projection.down is None or not costs_more_than_dense(projection):
        return projection
    return Projection(None, None, projection.up @ projection.down, dense_bias(projection))


def dense_bias(projection: Projection[Tensor]) -> Tensor | None:
    """The bias of a projection as a dense one: ``up @ down_bias + up_bias``."""
    _, down_bias, up, up_bias = projection
    if down_bias is None:
        return up_bias
    lifted = up @ down_bias
    return lifted if up_bias is None else lifted + up_bias


def validate(role: str, projection: Projection[Tensor], in_features: int, dtype: torch.dtype) -> None:
    """Check that a projection fits ``x[..., in_features]``.

    Raises:
        ShapeError: a factor or bias does not chain.
        DtypeError: a tensor is not of the input's dtype.
    """
    down, down_bias, up, up_bias = projection
    for position, tensor in enumerate(projection):
        if tensor is not None and tensor.dtype != dtype:
            raise DtypeError(argument_names(role)[position], tensor.dtype, dtype)
    inner = in_features
    if down is not None:
        _expect(f"{role}_down", down, (down.shape[0], in_features))
        inner = down.shape[0]
        if down_bias is not None:
            _expect(f"{role}_down_bias", down_bias, (inner,))
    _expect(f"{role}_up", up, (up.shape[0], inner))
    if up_bias is not None:
        _expect(f"{role}_up_bias", up_bias, (up.shape[0],))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ShapeError(f"shape of {name}", tuple(tensor.shape), shape)
