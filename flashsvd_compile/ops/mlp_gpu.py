"""A streamed MLP on a GPU: products large enough to fill the chip, whatever the ranks.

Rank space of the whole input is computed at once, into the memory of the result. Then a chunk of rows at a time passes
through ranges of the hidden layer, whose contributions are summed in float32. Rows and ranges are cut so that the
library's tiles leave few processors idle.

Factors of a rank that is no multiple of 8 have rows at addresses that no fast product can read: one of 4096 rows takes
five times as long at rank 1493 as at rank 1496. A range of such a factor is copied to where its rows are aligned, used,
and overwritten by the next, so that at no time a whole factor is copied.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.target import target_of
from ..kernels.tiles import aligned_columns
from . import projection as proj
from .activation import activate_, gate_
from .projection import Projection
from .workspace import Workspace, affine_into, rows_that_fit

LEAST_ROWS = 128
"""With fewer rows copying unaligned factors costs more than reading them slowly."""
ALIGNED = 8
"""Elements of half precision in 16 bytes."""
MAX_RANGES = 16


class Region(NamedTuple):
    """``out(act(into(x)))`` with all projections low-rank; ``into`` is the hidden layer's, then a gate's."""

    into: list[Projection[Tensor]]
    out: Projection[Tensor]
    activation: str

    @property
    def width(self) -> int:
        """Features of the hidden layer."""
        return proj.out_features(self.into[0])

    def columns_in_result(self) -> list[slice]:
        """Where in the result's columns the rank spaces of ``into`` wait for their turn."""
        starts = [0]
        for projection in self.into:
            starts.append(starts[-1] + aligned_columns(proj.rank(projection)))
        return [slice(start, start + proj.rank(p)) for start, p in zip(starts, self.into, strict=False)]


def supported(x: Tensor, region: Region) -> bool:
    """Half precision, low-rank members, rows enough, and a result that has room for the rank space of its rows."""
    features = proj.out_features(region.out)
    low_rank = all(projection.down is not None for projection in (*region.into, region.out))
    if not low_rank or x.element_size() != 2 or x.numel() < LEAST_ROWS * x.shape[-1] or features % ALIGNED:
        return False
    return region.columns_in_result()[-1].stop <= features


class Tile(NamedTuple):
    """Rows, and columns of the hidden layer, that are computed at a time; elements of workspace that takes."""

    rows: int
    columns: int
    elements: int


def tile_of(region: Region, rows: int, elements: int, processors: int) -> Tile:
    """The tile within ``elements`` of workspace whose products leave the fewest processors idle."""
    rank, ranks = proj.rank(region.out), [proj.rank(projection) for projection in region.into]
    unaligned = max((aligned_columns(r) for r in (rank, *ranks) if r % ALIGNED), default=0)

    def tile(ranges: int) -> Tile:
        columns = -(-region.width // (ranges * 128)) * 128
        per_row = max(len(ranks) * columns, aligned_columns(rank))
        sums = 2 * aligned_columns(rank) if ranges > 1 else 0  # float32
        left = elements - columns * unaligned
        chunk = rows_that_fit(max(0, left - 128 * (per_row + sums)), per_row + sums, rows)
        chunk = min(rows, -(-chunk // 128) * 128)
        return Tile(chunk, columns, chunk * (per_row + sums) + columns * unaligned)

    def cost(tile: Tile) -> float:
        chunks, ranges = -(-rows // tile.rows), -(-region.width // tile.columns)
        hidden = sum(_product_cost(tile.rows, tile.columns, r, processors) for r in ranks)
        summing = _product_cost(tile.rows, rank, tile.columns, processors)
        lifting = _product_cost(tile.rows, proj.out_features(region.out), rank, processors)
        copies = ranges * tile.columns * unaligned * (1 + len(ranks)) * COPYING
        return chunks * (ranges * (hidden + summing) + lifting + copies)

    return min(map(tile, range(1, MAX_RANGES + 1)), key=cost)


COPYING, LAUNCHING, FILLING = 4, 5_000_000, 256
"""In multiplications of one processor (2.5e12 a second): an element copied by the device, the time between two
products, the depth that filling and emptying a tile is worth."""


def _product_cost(rows: int, columns: int, depth: int, processors: int) -> float:
    """Multiplications one after another of ``[rows, depth] @ [depth, columns]``, idle processors waited for."""

    def of(tile_rows: int, tile_columns: int, share: float) -> float:
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        return -(-tiles // processors) * tile_rows * tile_columns * (depth + FILLING) / share

    return LAUNCHING + min(of(128, 256, 1.0), of(128, 192, 0.95), of(128, 128, 0.85))


def streamed(x: Tensor, region: Region, workspace_bytes: int) -> Tensor:
    """The MLP's ``[..., out_features]``. See :func:`supported`."""
    rows_in, out = x.reshape(-1, x.shape[-1]), region.out
    result = x.new_empty((*x.shape[:-1], proj.out_features(out)))
    rows_out = result.view(-1, result.shape[-1])
    latents = [rows_out[:, columns] for columns in region.columns_in_result()]
    for latent, projection in zip(latents, region.into, strict=True):
        assert projection.down is not None
        affine_into(latent, rows_in, projection.down, projection.down_bias)
    processors = target_of(x.device).processors
    tile = tile_of(region, rows_in.shape[0], workspace_bytes // x.element_size(), processors)
    workspace = Workspace(tile.elements, like=x, aligned=4)
    for start in range(0, rows_in.shape[0], tile.rows):
        rows = slice(start, min(start + tile.rows, rows_in.shape[0]))
        workspace.reset()
        latent = _through_hidden_layer([latent[rows] for latent in latents], region, tile.columns, workspace)
        _lift_all(rows_out[rows], latent, out, tile.columns, workspace)
    return result


def _through_hidden_layer(latents: list[Tensor], region: Region, columns: int, workspace: Workspace) -> Tensor:
    """``[rows, rank]``: the rank space of ``out``, in the workspace."""
    rows, rank, down = latents[0].shape[0], proj.rank(region.out), region.out.down
    assert down is not None
    if columns >= region.width:
        hidden = _hidden(latents, region, slice(0, region.width), workspace)
        return affine_into(_take_rows(workspace, rows, rank), hidden, down, region.out.down_bias)
    total = latents[0].new_empty(rows, aligned_columns(rank), dtype=torch.float32)[:, :rank]
    for first in range(0, region.width, columns):
        workspace.reset()
        features = slice(first, min(first + columns, region.width))
        hidden = _hidden(latents, region, features, workspace)
        _add_product(total, hidden, down[:, features], first == 0)
    workspace.reset()
    bias = region.out.down_bias
    return torch.add(total, 0.0 if bias is None else bias, out=_take_rows(workspace, rows, rank))


def _hidden(latents: list[Tensor], region: Region, features: slice, workspace: Workspace) -> Tensor:
    """``[rows, features]``: some of the activated hidden layer."""
    lifted = []
    for latent, projection in zip(latents, region.into, strict=True):
        out = workspace.aligned().take(latent.shape[0], features.stop - features.start)
        lifted.append(_lift(out, latent, projection, features, workspace))
    if len(lifted) == 1:
        return activate_(region.activation, lifted[0])
    hidden, gate = lifted
    return gate_(region.activation, gate, hidden)


def _lift_all(out: Tensor, latent: Tensor, projection: Projection[Tensor], columns: int, workspace: Workspace) -> None:
    """All features out of rank space; of an unaligned factor a range at a time."""
    width = out.shape[1]
    columns = columns if latent.shape[1] % ALIGNED else width
    for first in range(0, width, columns):
        features = slice(first, min(first + columns, width))
        _lift(out[:, features], latent, projection, features, workspace)


def _lift(out: Tensor, latent: Tensor, projection: Projection[Tensor], features: slice, workspace: Workspace) -> Tensor:
    """Some features out of rank space; an unaligned factor's are copied into the workspace for the while."""
    bias = None if projection.up_bias is None else projection.up_bias[features]
    factor, mark = projection.up[features], workspace.mark()
    if latent.shape[1] % ALIGNED:
        factor = _take_rows(workspace, *factor.shape).copy_(factor)
    workspace.reset(mark)
    return affine_into(out, latent, factor, bias)


def _take_rows(workspace: Workspace, rows: int, columns: int) -> Tensor:
    """``[rows, columns]``, each row aligned."""
    return workspace.aligned().take(rows, aligned_columns(columns))[:, :columns]


def _add_product(total: Tensor, x: Tensor, weight: Tensor, first: bool) -> None:
    """``total += x @ weight.T`` in float32; ``total`` is uninitialised at the first."""
    if first:
        torch.ops.aten.mm.dtype_out(x, weight.t(), torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, x, weight.t(), torch.float32, out=total)
