"""The truncated singular value decomposition of a weight, plain or weighted by what the layer sees."""

import torch
from torch import Tensor

FLOOR = 1e-6
"""Least eigenvalue of a moment, relative to the largest: what calibration never saw must not count as free."""


def truncated_svd(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of a matrix by one of a given rank.

    Best in the Frobenius norm of the weight, ``|W - up @ down|``; or, where the inputs' second moment ``M = L L^T`` is
    given, of the outputs, ``|(W - up @ down) L|``, by the decomposition of ``W L`` (SVD-LLM, arXiv:2403.07378).
    The singular values are split evenly, ``down = sqrt(S) V^T`` and ``up = U sqrt(S)``, so that both factors are of
    the same magnitude and round alike in a low precision.

    Args:
        weight: ``[out_features, in_features]``; half precision is decomposed in float32.
        rank: at most the smaller dimension.
        moment: ``[in_features, in_features]``, the sum of ``x x^T`` over inputs ``x``; decomposed in float64.

    Returns:
        ``down[rank, in_features]`` and ``up[out_features, rank]`` in the dtype of ``weight``.
    """
    if moment is None:
        matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        down, up = _balanced(matrix, rank)
    else:
        root, inverse = _root(moment.double())
        down, up = _balanced(weight.detach().double() @ root, rank)
        down = down @ inverse
    return down.to(weight.dtype), up.to(weight.dtype)


def _balanced(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` and its inverse, ``L L^T = moment``. By eigenvalues: few samples leave a moment short of full rank."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp(min=float(values[-1].clamp(min=1e-30)) * FLOOR).sqrt()
    return vectors * root, (vectors / root).T
