"""``flashsvd::packed_linear_v2``: up to three low-rank projections of the same rows, side by side in one result.

A norm may be taken of the rows first, and a residual is added to the result.
"""

import torch
from torch import Tensor

from ..errors import ShapeError
from . import few_rows, norm
from . import projection as proj
from .backward import Chunked, by_rows, differentiable
from .norm import Norm
from .projection import Projection
from .registry import register
from .residual import plus, plus_residual, validate_residual
from .workspace import Workspace, project_rows, rows_that_fit, validate_workspace

ROLES = ("first", "second", "third")
SCHEMA = (
    f"(Tensor x, {', '.join(map(proj.schema_of, ROLES))}, "
    f"Tensor? residual=None, {norm.schema_of('x')}, SymInt workspace_bytes=16777216) -> Tensor"
)
RESIDUAL = 1 + 4 * len(ROLES)
"""Position among the operator's arguments."""


def reference(x: Tensor, *arguments) -> Tensor:
    """The specification.

    Args:
        x: ``[..., in_features]``.
        arguments: the four tensors of each projection (see :class:`Projection`), the residual
            ``[..., sum of out_features]`` or ``None``, the norm of ``x`` (see :mod:`.norm`), then the workspace bound.

    Returns:
        ``[..., sum of out_features]``, contiguous, dtype of ``x``.
    """
    members, x_norm, _ = _parse(x, arguments)
    x, residual = norm.of_rows(x, x_norm), arguments[RESIDUAL - 1]
    result = torch.cat([proj.apply(x, member) for member in members], dim=-1)
    return result if residual is None else result + residual


def _fake(x: Tensor, *arguments) -> Tensor:
    members, *_ = _parse(x, arguments)
    return x.new_empty((*x.shape[:-1], sum(map(proj.out_features, members))))


@plus_residual(RESIDUAL)
def _cpu(x: Tensor, *arguments) -> Tensor:
    members, x_norm, workspace_bytes = _parse(x, arguments)
    rows, out = norm.of_rows(x.reshape(-1, x.shape[-1]), x_norm), _fake(x, *arguments)
    _streamed(rows, members, _columns(out, members), workspace_bytes)
    return out


def _cuda(x: Tensor, *arguments) -> Tensor:
    members, x_norm, _ = _parse(x, arguments)
    rows, residual = x.reshape(-1, x.shape[-1]), arguments[RESIDUAL - 1]
    if not few_rows.supported(rows, *members):
        return _cpu(x, *arguments)
    out = _fake(x, *arguments)
    if residual is not None and len(members) == 1:
        few_rows.project(rows, members, _columns(out, members), x_norm, residual.reshape(len(rows), -1))
        return out
    few_rows.project(rows, members, _columns(out, members), x_norm)
    return plus(out, residual)


def _columns(out: Tensor, members: list[Projection[Tensor]]) -> list[Tensor]:
    """``[rows, out_features]`` of each member in the result."""
    return list(out.view(-1, out.shape[-1]).split(list(map(proj.out_features, members)), dim=1))


def _streamed(x: Tensor, members: list[Projection[Tensor]], outs: list[Tensor], workspace_bytes: int) -> None:
    """One after the other, in chunks of rows whose rank-space intermediate lives in the workspace."""
    rank, rows = max(map(proj.rank, members)), x.shape[0]
    workspace = Workspace(rank * rows_that_fit(workspace_bytes, rank * x.element_size(), rows), like=x)
    for member, out in zip(members, outs, strict=True):
        project_rows(out, x, member, workspace)


def _cut(grad: Tensor, arguments: tuple) -> Chunked:
    members, _, workspace_bytes = _parse(arguments[0], arguments[1:])
    return by_rows(grad, arguments, sum(proj.rank(m) + proj.out_features(m) for m in members), workspace_bytes)


def _parse(x: Tensor, arguments: tuple) -> tuple[list[Projection[Tensor]], Norm | None, int]:
    """Undo the schema's flattening and check that everything fits.

    Raises:
        ShapeError, DtypeError: a projection is missing or does not fit.
        InvalidOptionError: unknown norm, no workspace.
    """
    residual, *of_x, workspace_bytes = arguments[RESIDUAL - 1 :]
    members = [member for member in proj.group(arguments[: RESIDUAL - 1]) if member is not None]
    if not members:
        raise ShapeError("projection 'first'", None, "a projection")
    for role, member in zip(ROLES, members, strict=False):
        proj.validate(role, member, x.shape[-1], x.dtype)
    validate_residual(residual, x, (*x.shape[:-1], sum(map(proj.out_features, members))))
    validate_workspace(workspace_bytes)
    return members, norm.parse("x", tuple(of_x), 1, x.shape[-1], x.dtype), workspace_bytes


packed_linear = register("packed_linear_v2", SCHEMA, reference=reference, fake=_fake, cpu=_cpu, cuda=_cuda, weight=3)
differentiable(packed_linear, reference, _cut, added=RESIDUAL)
