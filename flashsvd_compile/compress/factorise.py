"""Replace a model's dense layers by low-rank ones."""

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError, shown
from .calibration import second_moments
from .dense_layer import DenseLayer, ModelT, dense_layers, not_replaceable, replaced, uncompiled, why_not_copied
from .low_rank_linear import LowRankLinear
from .svd import truncated_svd

log = logging.getLogger(__name__)

DEFAULT_SKIP = ("*embed*", "*pooler*", "*classifier*", "*qa_outputs", "*score", "*head", "cls.*", "*router*", "*.gate")
"""Names of layers whose error reaches the output undamped, or that are small: embeddings, heads, poolers, routers."""

DECOMPOSABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights that a singular value decomposition is taken of."""


def compress(
    model: ModelT,
    keep_ratio: float = 0.5,
    *,
    ranks: Mapping[str, int] | None = None,
    targets: str | Iterable[str] = ("*",),
    skip: str | Iterable[str] = DEFAULT_SKIP,
    calibrate: Callable[[ModelT], object] | None = None,
) -> ModelT:
    """A copy of the model with its dense layers factored; the model itself is left as it was.

    Each ``nn.Linear`` (and ``Conv1D`` of transformers) of ``m`` outputs and ``n`` inputs becomes a
    :class:`LowRankLinear` of rank ``r = floor(keep_ratio * m * n / (m + n))``, at least 1. Left dense are layers where
    two factors would not be smaller, ``r * (m + n) >= m * n``; weights that other modules share, such as a language
    model's head tied to its embedding; subclasses of ``nn.Linear``, but Falcon's; and layers with hooks. Layers that
    are low-rank already stay as they are. Of a compiled model, that which was compiled is compressed.

    Args:
        keep_ratio: share of a weight's parameters that its factors may have, between 0 and 1.
        ranks: rank by layer name, ahead of ``keep_ratio``. Keys are shell patterns of dotted names, such as
            ``"*.attention.*"``; of several that fit, the first counts.
        targets: patterns of the names to factor; a plain string is one pattern.
        skip: likewise, patterns of the names to leave dense, whatever ``targets`` and ``ranks`` say.
        calibrate: runs the model on sample data, as ``lambda model: model(**batch)``. The factors then keep the
            layers' outputs on that data rather than the weights, which loses far less. A layer that does not run gets
            the plain decomposition, as all do without ``calibrate``.

    Returns:
        The factored copy, of the same class, dtypes, devices and training mode.

    Raises:
        CompressionError: a value out of range or of another type, a pattern that fits no layer, nothing to factor, a
            model that cannot be copied (scripted, with a weight computed from others, with a lock), a calibration that
            runs no layer, or a weight or calibration data that cannot be decomposed (not of 16 to 64 bits in floating
            point, not finite, on the meta device).
    """
    ranks, model = {} if ranks is None else ranks, uncompiled(model)
    _check_values(keep_ratio, ranks, calibrate)
    if (obstacle := why_not_copied(model)) is not None:
        raise CompressionError(obstacle)
    targets, skip = _patterns("targets", targets), _patterns("skip", skip)
    if not targets:
        raise CompressionError("targets has no pattern; '*' fits all layers")
    dense = dict(dense_layers(model))
    layers = {name: layer for name, layer in dense.items() if not fits_any(name, skip)}
    if not layers:
        skipped = [f"skip leaves out {', '.join(dense)}"] if dense else []
        reasons = [*skipped, *not_replaceable(model)] or ["it has neither nn.Linear nor Conv1D of transformers"]
        raise CompressionError(f"{type(model).__name__} has no layer that can be factored: {'; '.join(reasons)}")
    _check_patterns((*targets, *ranks), layers)
    wanted = {name: _rank(name, layers[name], keep_ratio, ranks) for name in layers if fits_any(name, targets)}
    chosen = {name: rank for name, rank in wanted.items() if isinstance(rank, int)}
    left = {name: why for name, why in wanted.items() if isinstance(why, str)}
    for name, why in left.items():
        log.info("left %s dense: %s", name, why)
    if not chosen:
        name, why = next(iter(left.items()))
        raise CompressionError(f"the model has no layer that low rank would make smaller; {name!r} stays dense: {why}")
    moments = second_moments(model, chosen, lambda: calibrate(model)) if calibrate is not None else {}
    if calibrate is not None and not moments:
        raise CompressionError("calibrate ran none of the layers to factor; it has to run the model that it is given")
    log.info("factoring %d of %d dense layers", len(chosen), len(layers))
    factored = {name: _factorise(name, layers[name], rank, moments.get(name)) for name, rank in chosen.items()}
    try:
        return replaced(model, factored)
    except TypeError as error:
        raise CompressionError(f"{type(model).__name__} cannot be copied: {error}") from error


@torch.no_grad()
def _factorise(name: str, layer: DenseLayer, rank: int, moment: Tensor | None) -> LowRankLinear:
    """The low-rank layer nearest to a dense one. ``name`` is for the error message."""
    weight = layer.weight
    if weight.is_meta:
        raise CompressionError(f"the weight of {name!r} has no numbers: it is on the meta device; load the model first")
    if weight.dtype not in DECOMPOSABLE:
        valid = ", ".join(map(str, DECOMPOSABLE))
        raise CompressionError(f"the weight of {name!r} is {weight.dtype}; valid: {valid}")
    if not bool(weight.isfinite().all()):
        raise CompressionError(f"the weight of {name!r} has values that are NaN or infinite")
    low_rank = layer.low_rank(rank)
    down, up = truncated_svd(weight, rank, moment)
    low_rank.down.weight.copy_(down)
    low_rank.up.weight.copy_(up)
    if layer.bias is not None:
        low_rank.up.bias.copy_(layer.bias)
    return low_rank


def _rank(name: str, layer: DenseLayer, keep_ratio: float, ranks: Mapping[str, int]) -> int | str:
    """The layer's rank, or why it stays dense."""
    m, n = layer.weight.shape
    if m == 0 or n == 0:
        return f"it is empty, {m} x {n}"
    rank = next((rank for pattern, rank in ranks.items() if fnmatchcase(name, pattern)), None)
    rank = max(1, int(keep_ratio * m * n / (m + n))) if rank is None else int(rank)
    if layer.tied:
        return "its weight is shared with another module"
    if rank * (m + n) >= m * n:
        largest = (m * n - 1) // (m + n)
        return f"two factors of rank {rank} are not smaller than {m} x {n}, which they are up to rank {largest}"
    return rank


def _check_values(keep_ratio: float, ranks: object, calibrate: object) -> None:
    if not isinstance(keep_ratio, Real) or not 0 < keep_ratio < 1:
        raise CompressionError(f"keep_ratio must be between 0 and 1, not {shown(keep_ratio)}")
    if calibrate is not None and not callable(calibrate):
        raise CompressionError(f"calibrate must be a function that runs the model, not {shown(calibrate)}")
    if not isinstance(ranks, Mapping):
        raise CompressionError(f"ranks must map patterns of layer names to ranks, not {shown(ranks)}")
    for pattern, rank in ranks.items():
        if not isinstance(pattern, str):
            raise CompressionError(f"ranks must map patterns of layer names to ranks, not {pattern!r}")
        if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
            raise CompressionError(f"the rank of {pattern!r} must be a positive integer, not {shown(rank)}")


def _patterns(argument: str, value: Any) -> tuple[str, ...]:
    """The patterns given for an argument; a plain string is one."""
    if isinstance(value, str):
        return (value,)
    patterns = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise CompressionError(f"{argument} must be patterns of layer names, not {shown(value)}")
    return tuple(map(str, patterns))


def _check_patterns(patterns: Iterable[str], layers: Mapping[str, DenseLayer]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise CompressionError(f"pattern {pattern!r} fits none of the {len(layers)} layers that can be factored")


def fits_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name fits one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
