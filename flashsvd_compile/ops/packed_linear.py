"""``flashsvd::packed_linear_v1``: up to three low-rank projections of the same rows, side by side in one result."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import ShapeError
from . import few_rows
from . import projection as proj
from .backward import Chunked, by_rows, differentiable
from .projection import Projection
from .registry import register
from .workspace import Workspace, project_rows, rows_that_fit, validate_workspace

ROLES = ("first", "second", "third")
SCHEMA = f"(Tensor x, {', '.join(map(proj.schema_of, ROLES))}, SymInt workspace_bytes=16777216) -> Tensor"


def reference(x: Tensor, *arguments) -> Tensor:
    """The specification: ``x[..., in_features]`` to a contiguous ``[..., sum of out_features]``."""
    members, _ = _parse(x, arguments)
    return torch.cat([proj.apply(x, member) for member in members], dim=-1)


def _fake(x: Tensor, *arguments) -> Tensor:
    members, _ = _parse(x, arguments)
    return x.new_empty((*x.shape[:-1], sum(map(proj.out_features, members))))


def _cpu(x: Tensor, *arguments) -> Tensor:
    members, workspace_bytes = _parse(x, arguments)
    rows, out = x.reshape(-1, x.shape[-1]), _fake(x, *arguments)
    _streamed(rows, members, _columns(out, members), workspace_bytes)
    return out


def _cuda(x: Tensor, *arguments) -> Tensor:
    members, workspace_bytes = _parse(x, arguments)
    rows, out = x.reshape(-1, x.shape[-1]), _fake(x, *arguments)
    columns = _columns(out, members)
    if few_rows.supported(rows, *members):
        few_rows.project(rows, members, columns)
    else:
        _streamed(rows, members, columns, workspace_bytes)
    return out


def _columns(out: Tensor, members: list[Projection[Tensor]]) -> list[Tensor]:
    """``[rows, out_features]`` of each member in the result."""
    ends = accumulate(map(proj.out_features, members), initial=0)
    return [out.view(-1, out.shape[-1])[:, start:end] for start, end in pairwise(ends)]


def _streamed(x: Tensor, members: list[Projection[Tensor]], outs: list[Tensor], workspace_bytes: int) -> None:
    """One after the other, in chunks of rows whose rank-space intermediate lives in the workspace."""
    rank, rows = max(map(proj.rank, members)), x.shape[0]
    workspace = Workspace(rank * rows_that_fit(workspace_bytes, rank * x.element_size(), rows), like=x)
    for member, out in zip(members, outs, strict=True):
        project_rows(out, x, member, workspace)


def _cut(grad: Tensor, arguments: tuple) -> Chunked:
    members, workspace_bytes = _parse(arguments[0], arguments[1:])
    return by_rows(grad, arguments, sum(proj.rank(m) + proj.out_features(m) for m in members), workspace_bytes)


def _parse(x: Tensor, arguments: tuple) -> tuple[list[Projection[Tensor]], int]:
    *tensors, workspace_bytes = arguments
    members = [member for member in proj.group(tuple(tensors)) if member is not None]
    if not members:
        raise ShapeError("projection 'first'", None, "a projection")
    for role, member in zip(ROLES, members, strict=False):
        proj.validate(role, member, x.shape[-1], x.dtype)
    validate_workspace(workspace_bytes)
    return members, workspace_bytes


packed_linear = register("packed_linear_v1", SCHEMA, reference=reference, fake=_fake, cpu=_cpu, cuda=_cuda)
differentiable(packed_linear, reference, _cut)
