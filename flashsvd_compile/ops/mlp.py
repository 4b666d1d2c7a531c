"""``flashsvd::mlp_v3``: a two-layer or gated MLP out of (low-rank) projections, as one operator.

    y = out(act(hidden(x)))                    without gate
    y = out(act(gate(x)) * hidden(x))          with gate

A norm may be taken of x first, and a residual is added to y. The hidden tensor exists for a chunk of rows at a time.
"""

from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from ..errors import ShapeError
from ..kernels import mlp as triton_mlp
from ..kernels.partial_sums import add_up
from ..kernels.tiles import empty_with_aligned_rows
from ..options import Strategy
from . import few_rows, mlp_gpu, norm
from . import projection as proj
from .activation import activate_, activation_of, gate_
from .aligned import with_aligned_rank
from .backward import Chunked, by_rows, differentiable
from .mlp_region import Mlp
from .projection import Projection
from .ranges import ranges
from .registry import register
from .residual import joined, plus, plus_residual, validate_residual
from .workspace import (
    Workspace,
    activated_into,
    add_product,
    affine_into,
    rows_of,
    rows_that_fit,
    validate_execution,
)

ROLES = ("hidden", "gate", "out")
SCHEMA = (
    f"(Tensor x, {', '.join(map(proj.schema_of, ROLES))}, "
    f"Tensor? residual=None, {norm.schema_of('x')}, "
    "str activation='gelu', str strategy='streamed', SymInt workspace_bytes=16777216) -> Tensor"
)
RESIDUAL = 1 + 4 * len(ROLES)
"""Position among the operator's arguments."""
GPU_COLUMNS = 768
"""Columns of a float32 hidden layer that a GPU computes at a time: the workspace then holds rows enough to fill it."""
CPU_COLUMNS = 512
"""Narrower tiles starve the products; wider ones leave room for fewer rows, and the library packs weights again for
each chunk of rows."""


def reference(x: Tensor, *arguments) -> Tensor:
    """The specification, in plain PyTorch and with every intermediate at full size.

    Args:
        x: ``[..., in_features]``.
        arguments: the four tensors of ``hidden``, ``gate`` and ``out`` (see :class:`Projection`), the residual
            ``[..., out_features]`` or ``None``, the norm of ``x`` (see :mod:`.norm`), then the names of activation and
            strategy and the workspace bound.

    Returns:
        ``[..., out_features]``, contiguous, dtype of ``x``.
    """
    mlp, _, _ = _parse(x, arguments)
    act, x = activation_of(mlp.activation), norm.of_rows(x, mlp.x_norm)
    hidden = proj.apply(x, mlp.hidden)
    hidden = act(hidden) if mlp.gate is None else act(proj.apply(x, mlp.gate)) * hidden
    result, residual = proj.apply(hidden, mlp.out).contiguous(), arguments[RESIDUAL - 1]
    return result if residual is None else result + residual


def _fake(x: Tensor, *arguments) -> Tensor:
    mlp, *_ = _parse(x, arguments)
    return x.new_empty((*x.shape[:-1], proj.out_features(mlp.out)))


@plus_residual(RESIDUAL)
def _cpu(x: Tensor, *arguments) -> Tensor:
    mlp, strategy, workspace_bytes = _parse(x, arguments)
    mlp = mlp.merged() if strategy == Strategy.MERGED else mlp
    if scratch_as_a_whole(x, mlp) <= workspace_bytes:
        return _as_a_whole(norm.of_rows(x, mlp.x_norm), mlp)
    return streamed(x, mlp, workspace_bytes, columns=CPU_COLUMNS if x.element_size() >= 4 else None)


def _cuda(x: Tensor, *arguments) -> Tensor:
    mlp, strategy, workspace_bytes = _parse(x, arguments)
    rows, residual = rows_of(x), arguments[RESIDUAL - 1]
    if few_rows.supported(rows, *mlp.into_hidden, mlp.out):
        added = None if residual is None else residual.reshape(len(rows), -1)
        return few_rows.mlp(rows, mlp, added).view(*x.shape[:-1], -1)
    mlp = mlp.merged() if strategy == Strategy.MERGED else mlp
    if strategy == Strategy.FUSED and _fusible(x, mlp):
        return plus(_fused(norm.of_rows(x, mlp.x_norm), mlp, workspace_bytes), residual)
    if mlp_gpu.supported(x, mlp):
        return joined(partial(mlp_gpu.streamed, x, mlp, workspace_bytes), residual)
    columns = GPU_COLUMNS if x.element_size() >= 4 else None
    return plus(streamed(x, mlp, workspace_bytes, columns), residual)


def _fusible(x: Tensor, mlp: Mlp) -> bool:
    """Whether the fused kernel has a configuration: both projections low-rank, no gate, ranks that fit the chip."""
    if mlp.gate is not None or mlp.hidden.down is None or mlp.out.down is None or x.numel() == 0:
        return False
    return triton_mlp.supported(proj.rank(mlp.hidden), proj.rank(mlp.out), x.dtype, x.device)


def _fused(x: Tensor, mlp: Mlp, workspace_bytes: int) -> Tensor:
    """Two narrow library products of a normalised ``x`` around one kernel that keeps the hidden layer on chip.

    Where rows are too few to fill the chip, the hidden layer is split among more programs: as far as rank space and the
    partial sums fit in what the result, which comes when they are gone, and the workspace take.
    """
    rows_in = rows_of(x)
    rows = rows_in.shape[0]
    into, out_of = with_aligned_rank(mlp.hidden, rows), with_aligned_rank(mlp.out, rows)
    assert into.down is not None and out_of.down is not None
    latent = empty_with_aligned_rows(rows, proj.rank(into), x)
    affine_into(latent, rows_in, into.down, into.down_bias)
    room = workspace_bytes // x.element_size() + rows * (proj.out_features(out_of) - proj.rank(into))
    max_splits = max(1, room // (rows * proj.rank(out_of)))
    parts = triton_mlp.mlp_core(latent, into.up, into.up_bias, out_of.down, mlp.activation, max_splits)
    del latent
    summed = add_up(parts, out_of.down_bias)
    del parts
    out = x.new_empty((*x.shape[:-1], proj.out_features(out_of)))
    affine_into(out.view(rows, -1), summed, out_of.up, out_of.up_bias)
    return out


def _as_a_whole(x: Tensor, mlp: Mlp) -> Tensor:
    """A small region of a normalised input, whose time is that of launching operations: as few as there can be."""
    hidden = proj.apply(x, mlp.hidden)
    if mlp.gate is None:
        activate_(mlp.activation, hidden)
    else:
        hidden = gate_(mlp.activation, proj.apply(x, mlp.gate), hidden)
    if mlp.out.down is not None:
        hidden = linear(hidden, mlp.out.down, mlp.out.down_bias)  # lets go of the hidden layer before the result
    return linear(hidden, mlp.out.up, mlp.out.up_bias).contiguous()


def scratch_as_a_whole(x: Tensor, mlp: Mlp) -> int:
    """Bytes that :func:`_as_a_whole` and its input's norm hold next to the result."""
    rows = x.numel() // max(1, x.shape[-1])
    normalised = 0 if mlp.x_norm is None else x.shape[-1]
    return rows * (normalised + workspace_elements_per_row(mlp)) * x.element_size()


class Tiling(NamedTuple):
    """Rows, and columns of the hidden layer, that :func:`streamed` computes at a time.

    Attributes:
        elements: elements of workspace that this needs.
    """

    rows: int
    columns: int
    elements: int


def tiling(mlp: Mlp, rows: int, workspace_elements: int, columns: int) -> Tiling:
    """As many rows as fit with ``columns`` of the hidden layer, then as many columns as fit with these rows.

    Normalised rows are not in the workspace but count.
    """
    latent, copies = _latent_beside_result(mlp), len(mlp.into_hidden)
    normalised = 0 if mlp.x_norm is None else proj.in_features(mlp.hidden)
    columns, total = min(columns, mlp.width), proj.rank(mlp.out)
    rows = rows_that_fit(workspace_elements, normalised + latent + max(copies * columns, total), rows)
    columns = max(columns, rows_that_fit(workspace_elements // rows - normalised - latent, copies, mlp.width))
    return Tiling(rows, columns, rows * (latent + max(copies * columns, total)))


def _latent_beside_result(mlp: Mlp) -> int:
    """Rank-space elements of a row for which the result's memory has no room; see :func:`_take`."""
    room, beside = proj.out_features(mlp.out) if mlp.out.down is not None else 0, 0
    for rank in map(proj.rank, (*mlp.into_hidden, mlp.out)):
        if rank <= room:
            room -= rank
        else:
            beside += rank
    return beside


def streamed(x: Tensor, mlp: Mlp, workspace_bytes: int, columns: int | None) -> Tensor:
    """Tiles of the hidden layer through one workspace; nothing of size ``rows x width`` ever exists.

    A tile is written, activated and read while it is still in cache. Its contribution is summed up in the rank space
    of ``out``, or in the result where ``out`` is dense. Until its last product the result's own memory holds as much
    of the rank space as fits, which leaves the workspace to the tiles.

    Args:
        columns: least width of a tile; ``None`` keeps the hidden layer whole, as half precision needs, where a sum
            that is stored after each tile is rounded each time.
    """
    rows_in = rows_of(x)
    out = x.new_empty((*x.shape[:-1], proj.out_features(mlp.out)))
    rows_out = out.view(-1, out.shape[-1])
    total = rows_in.shape[0]
    if total == 0:
        return out
    tile = tiling(mlp, total, workspace_bytes // x.element_size(), columns or mlp.width)
    workspace = Workspace(tile.elements, like=x)
    for rows in ranges(total, tile.rows):
        workspace.reset()
        _stream_rows(rows_out[rows], norm.of_rows(rows_in[rows], mlp.x_norm), mlp, tile.columns, workspace)
    return out


def _stream_rows(out: Tensor, x: Tensor, mlp: Mlp, columns: int, workspace: Workspace) -> None:
    """Fill ``out[rows, out_features]`` for normalised ``x``, some columns of the hidden layer at a time."""
    memories = (workspace,) if mlp.out.down is None else (Workspace.over(out), workspace)
    hidden_latent = _latent(x, mlp.hidden, memories)
    gate_latent = x if mlp.gate is None else _latent(x, mlp.gate, memories)
    into, bias, total = mlp.out.up, mlp.out.up_bias, out
    if mlp.out.down is not None:
        into, bias, total = mlp.out.down, mlp.out.down_bias, _take(x.shape[0], proj.rank(mlp.out), memories)
    mark = workspace.mark()
    for features in ranges(mlp.width, columns):
        workspace.reset(mark)
        if mlp.gate is None:
            hidden = _lift(hidden_latent, mlp.hidden, features, workspace, mlp.activation)
        else:
            hidden = _lift(hidden_latent, mlp.hidden, features, workspace)
            hidden = gate_(mlp.activation, _lift(gate_latent, mlp.gate, features, workspace), hidden)
        if features.start == 0:
            affine_into(total, hidden, into[:, features], bias)
        else:
            add_product(total, hidden, into[:, features])
    if mlp.out.down is not None:
        if not workspace.owns(total):  # out of the way of the result
            workspace.reset(mark)
            total = workspace.take(*total.shape).copy_(total)
        affine_into(out, total, mlp.out.up, mlp.out.up_bias)


def _take(rows: int, columns: int, memories: tuple[Workspace, ...]) -> Tensor:
    """``[rows, columns]`` out of the first memory that has room."""
    return next(memory for memory in memories if memory.left() >= rows * columns).take(rows, columns)


def _latent(x: Tensor, projection: Projection[Tensor], memories: tuple[Workspace, ...]) -> Tensor:
    """``[rows, rank]``; the input itself for a dense projection."""
    if projection.down is None:
        return x
    latent = _take(x.shape[0], proj.rank(projection), memories)
    return affine_into(latent, x, projection.down, projection.down_bias)


def _lift(
    latent: Tensor,
    projection: Projection[Tensor],
    features: slice,
    workspace: Workspace,
    activation: str | None = None,
) -> Tensor:
    """``[rows, features]``: some features of a projection out of its rank space, activated if there is a name."""
    bias = None if projection.up_bias is None else projection.up_bias[features]
    lifted = workspace.take(latent.shape[0], features.stop - features.start)
    if activation is None:
        return affine_into(lifted, latent, projection.up[features], bias)
    return activated_into(lifted, latent, projection.up[features], bias, activation)


def workspace_elements_per_row(mlp: Mlp) -> int:
    """Elements of scratch one row needs in :func:`streamed`."""
    return sum(proj.rank(p) + mlp.width for p in mlp.into_hidden) + proj.rank(mlp.out)


def _cut(grad: Tensor, arguments: tuple) -> Chunked:
    mlp, *_, workspace_bytes = _parse(arguments[0], arguments[1:])
    return by_rows(grad, arguments, workspace_elements_per_row(mlp), workspace_bytes)


def _parse(x: Tensor, arguments: tuple) -> tuple[Mlp, str, int]:
    """Undo the schema's flattening and check that everything fits.

    Raises:
        ShapeError, DtypeError: a projection is missing or does not fit.
        InvalidOptionError: unknown norm, activation or strategy, no workspace.
    """
    tensors, residual, rest = arguments[: RESIDUAL - 1], arguments[RESIDUAL - 1], arguments[RESIDUAL:]
    of_x, (activation, strategy, workspace_bytes) = rest[: norm.ARGUMENTS_PER_NORM], rest[norm.ARGUMENTS_PER_NORM :]
    hidden, gate, out = proj.group(tensors)
    if hidden is None or out is None:
        raise ShapeError("projection 'hidden' or 'out'", None, "a projection")
    proj.validate("hidden", hidden, x.shape[-1], x.dtype)
    width = proj.out_features(hidden)
    if gate is not None:
        proj.validate("gate", gate, x.shape[-1], x.dtype)
        if proj.out_features(gate) != width:
            raise ShapeError("width of gate", proj.out_features(gate), width)
    proj.validate("out", out, width, x.dtype)
    validate_residual(residual, x, (*x.shape[:-1], proj.out_features(out)))
    activation_of(activation)
    validate_execution(strategy, workspace_bytes)
    x_norm = norm.parse("x", of_x, 1, x.shape[-1], x.dtype)
    return Mlp(hidden, gate, out, activation, x_norm), strategy, workspace_bytes


mlp = register("mlp_v3", SCHEMA, reference=reference, fake=_fake, cpu=_cpu, cuda=_cuda, weight=RESIDUAL - 2)
differentiable(mlp, reference, _cut, added=RESIDUAL)
