"""``flashsvd::linear_v1``: one low-rank projection without its rank-space intermediate at full size."""

from torch import Tensor

from ..errors import ShapeError
from ..options import Strategy
from . import few_rows
from . import projection as proj
from .aligned import with_aligned_rank
from .backward import Chunked, by_rows, differentiable
from .projection import Projection
from .registry import register
from .workspace import Workspace, project_rows, rows_of, rows_that_fit, validate_execution

SCHEMA = f"(Tensor x, {proj.schema_of('w')}, str strategy='streamed', SymInt workspace_bytes=16777216) -> Tensor"


def reference(x: Tensor, *arguments) -> Tensor:
    """The specification: ``x[..., in_features]`` to a contiguous ``[..., out_features]``."""
    weight, _, _ = _parse(x, arguments)
    return proj.apply(x, weight).contiguous()


def _fake(x: Tensor, *arguments) -> Tensor:
    weight, _, _ = _parse(x, arguments)
    return x.new_empty((*x.shape[:-1], proj.out_features(weight)))


def _cpu(x: Tensor, *arguments) -> Tensor:
    weight, strategy, workspace_bytes = _parse(x, arguments)
    if strategy == Strategy.MERGED:
        weight = proj.merge_if_cheaper(weight)
    return streamed(x, weight, workspace_bytes)


def _cuda(x: Tensor, *arguments) -> Tensor:
    weight, strategy, workspace_bytes = _parse(x, arguments)
    rows = rows_of(x)
    if few_rows.supported(rows, weight):
        out = _fake(x, *arguments)
        few_rows.project(rows, [weight], [out.view(len(rows), -1)])
        return out
    weight = proj.merge_if_cheaper(weight) if strategy == Strategy.MERGED else with_aligned_rank(weight, len(rows))
    return streamed(x, weight, workspace_bytes)


def streamed(x: Tensor, weight: Projection[Tensor], workspace_bytes: int) -> Tensor:
    """Chunks of rows; the rank-space intermediate of one chunk lives in the workspace."""
    rows, out = rows_of(x), x.new_empty((*x.shape[:-1], proj.out_features(weight)))
    chunk = rows_that_fit(workspace_bytes, proj.rank(weight) * x.element_size(), len(rows))
    project_rows(out.view(-1, out.shape[-1]), rows, weight, Workspace(proj.rank(weight) * chunk, like=x))
    return out


def _cut(grad: Tensor, arguments: tuple) -> Chunked:
    weight, _, workspace_bytes = _parse(arguments[0], arguments[1:])
    return by_rows(grad, arguments, proj.rank(weight) + proj.out_features(weight), workspace_bytes)


def _parse(x: Tensor, arguments: tuple) -> tuple[Projection[Tensor], str, int]:
    *tensors, strategy, workspace_bytes = arguments
    (weight,) = proj.group(tuple(tensors))
    if weight is None:
        raise ShapeError("projection 'w'", None, "a projection")
    proj.validate("w", weight, x.shape[-1], x.dtype)
    validate_execution(strategy, workspace_bytes)
    return weight, strategy, workspace_bytes


linear = register("linear_v1", SCHEMA, reference=reference, fake=_fake, cpu=_cpu, cuda=_cuda, weight=3)
differentiable(linear, reference, _cut)
