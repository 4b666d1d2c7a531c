"""A streamed MLP on a GPU: products large enough to fill the chip, whatever the ranks.

Rank space of the whole input is computed first, into the memory of the result. Then a chunk of rows at a time passes
through ranges of the hidden layer, whose contributions are summed in float32. Rows and ranges are cut so that the
library's tiles leave few processors idle.

The library multiplies slowly where a rank is no multiple of 8: 4096 rows take five times as long at rank 1493 as at
1496; and a third longer than need be where rows begin at half sectors of memory. There a range of a factor at a time is
copied, padded with zeros, used and overwritten by the next.

Where a kernel activates what it multiplies, a gate is multiplied last and over the hidden layer, which leaves room for
a longer range. Unless both factors are copied, one launch multiplies gate and hidden layer, a tile of them at a time.

With room enough, copies of whole factors into the hidden layer are kept for all chunks, and chunks are of rows alone.
Nothing is summed up then, and gate and hidden layer come from one launch.
"""

from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.operands import Product
from ..kernels.padding import padded_copy
from ..kernels.product import SECTOR, multiply
from ..kernels.target import target_of
from . import norm
from . import projection as proj
from .activation import activate_, gate_
from .aligned import padded, padded_bias
from .mlp_region import Mlp
from .mlp_tiles import HiddenTile, Sizes, even_ranges, tile_of
from .projection import Projection
from .ranges import ranges, width_of
from .workspace import affine_into, affine_plus, rows_of, rows_that_fit

LEAST_ROWS_TO_STREAM = 128
"""With fewer rows copying factors costs more than multiplying them slowly."""


def supported(x: Tensor, mlp: Mlp) -> bool:
    """Half precision, low-rank members, rows enough, and a result that has room for the rank space of its rows."""
    features = proj.out_features(mlp.out)
    low_rank = all(projection.down is not None for projection in (*mlp.into_hidden, mlp.out))
    if not low_rank or x.element_size() != 2 or x.numel() < LEAST_ROWS_TO_STREAM * x.shape[-1] or features % SECTOR:
        return False
    return _columns_in_result(mlp)[-1].stop <= features


def _columns_in_result(mlp: Mlp) -> list[slice]:
    """Where in the result's columns the padded rank spaces of hidden layer and gate wait for their turn."""
    ranks = [padded(proj.rank(projection)) for projection in mlp.into_hidden]
    return [slice(stop - rank, stop) for rank, stop in zip(ranks, accumulate(ranks), strict=True)]


def streamed(x: Tensor, mlp: Mlp, workspace_bytes: int, residual: Tensor | None = None) -> Tensor:
    """The MLP's ``[..., out_features]`` plus the residual, which is contiguous. See :func:`supported`.

    A norm of ``x`` exists for as many rows at a time as the workspace, which is allocated after it, has room for.
    """
    rows_in = rows_of(x)
    result = x.new_empty((*x.shape[:-1], proj.out_features(mlp.out)))
    rows_out = result.view(-1, result.shape[-1])
    latents = [rows_out[:, columns] for columns in _columns_in_result(mlp)]
    elements = workspace_bytes // x.element_size()
    per_row = 0 if mlp.x_norm is None else x.shape[-1]
    for rows in ranges(rows_in.shape[0], rows_that_fit(elements, per_row, rows_in.shape[0])):
        normalised = norm.of_rows(rows_in[rows], mlp.x_norm)
        _into_rank_space([latent[rows] for latent in latents], normalised, mlp.into_hidden)
        del normalised
    tile = tile_of(mlp, rows_in.shape[0], elements, target_of(x.device))
    added = None if residual is None else residual.view(rows_out.shape)
    if tile.kept:
        _keeping_copies(rows_out, latents, mlp, tile, added)
        return result
    chunks = _Chunks(mlp, tile, like=x)
    for rows in ranges(rows_in.shape[0], tile.rows):
        chunks.finish(rows_out[rows], [latent[rows] for latent in latents], None if added is None else added[rows])
    return result


def _into_rank_space(latents: list[Tensor], x: Tensor, projections: list[Projection[Tensor]]) -> None:
    """``latents[rows, padded rank]`` of ``x[rows, features]``, zero where they are padded."""
    for latent, projection in zip(latents, projections, strict=True):
        down = projection.down
        assert down is not None
        if latent.shape[1] > down.shape[0]:
            down = padded_copy(down, down.new_empty(latent.shape[1], down.shape[1]))
        affine_into(latent, x, down, padded_bias(projection.down_bias, latent.shape[1]))


def _keeping_copies(out: Tensor, latents: list[Tensor], mlp: Mlp, tile: HiddenTile, residual: Tensor | None) -> None:
    """``out[rows, features]``, the residual added, from the rank space before the hidden layer, which lies in it.

    A chunk's rank space behind the hidden layer takes the place of that before, where it is in the way of the result.
    When the hidden layers are gone, it is copied to where they were, and so is the last factor.
    """
    memory = out.new_empty(tile.rows * mlp.width)
    copies = out.new_empty(tile.copied).split([_copied(projection) for projection in mlp.into_hidden])
    factors = [
        _padded(projection.up, mlp.width, latent.shape[1], copy)
        for projection, latent, copy in zip(mlp.into_hidden, latents, copies, strict=True)
    ]
    after = out[:, : padded(proj.rank(mlp.out))]
    assert mlp.out.down is not None
    for rows in even_ranges(len(out), tile.rows):
        hidden = _view(memory, width_of(rows), mlp.width)
        *gate, last = (
            Product(latent[rows], factor, projection.up_bias, hidden)
            for latent, factor, projection in zip(latents, factors, mlp.into_hidden, strict=True)
        )
        multiply(last, mlp.activation, gate[0] if gate else None)
        multiply(Product(hidden, mlp.out.down, mlp.out.down_bias, after[rows]))
    copy, rest = memory.split([_copied(mlp.out), memory.numel() - _copied(mlp.out)])
    factor = _padded(mlp.out.up, out.shape[1], after.shape[1], copy)
    for rows in ranges(len(out), rest.numel() // after.shape[1]):
        latent = padded_copy(after[rows], _view(rest, width_of(rows), after.shape[1]))
        affine_plus(out[rows], latent, factor, mlp.out.up_bias, None if residual is None else residual[rows])


def _copied(projection: Projection[Tensor]) -> int:
    """Elements of a copy of the projection's second factor, if it needs one."""
    rank = proj.rank(projection)
    return padded(rank) * proj.out_features(projection) if rank % SECTOR else 0


class _Chunks:
    """A chunk of rows at a time from the rank space before the hidden layer to the result, through the same memory."""

    def __init__(self, mlp: Mlp, tile: HiddenTile, like: Tensor):
        self._mlp, self._columns = mlp, tile.columns
        self._activated_at_once = tile.activated
        self._lifted_at_once = Sizes.of(mlp).lifted_at_once(tile.columns)
        self._rank = padded(proj.rank(mlp.out))
        self._bias = padded_bias(mlp.out.down_bias, self._rank)
        self._hidden = like.new_empty(tile.rows * tile.columns)
        self._beside = like.new_empty(tile.rows * tile.beside)
        self._factor = like.new_empty(tile.copied)
        self._sums = like.new_empty(tile.rows, tile.summed, dtype=torch.float32)

    def finish(self, out: Tensor, latents: list[Tensor], residual: Tensor | None) -> None:
        """``out[rows, features]``, the residual added; its memory may be where the latents are."""
        latent = self._rank_space_of_out(latents)
        for features in ranges(out.shape[1], self._lifted_at_once):
            added = None if residual is None else residual[:, features]
            self._lift(out[:, features], latent, self._mlp.out, features, added)

    def _rank_space_of_out(self, latents: list[Tensor]) -> Tensor:
        rows, down = latents[0].shape[0], self._mlp.out.down
        assert down is not None
        sums, beside = self._sums[:rows], self._beside.numel() >= rows * self._rank
        total = _view(self._beside if beside else self._hidden, rows, self._rank)
        for features in ranges(self._mlp.width, self._columns):
            hidden = self._activated(latents, features)
            factor = _padded(down[:, features], self._rank, hidden.shape[1], self._factor)
            if not sums.numel():
                return affine_into(total, hidden, factor, self._bias)
            _add_product(sums, hidden, factor, features.start == 0)
        return total.copy_(sums) if self._bias is None else torch.add(sums, self._bias, out=total)

    def _activated(self, latents: list[Tensor], features: slice) -> Tensor:
        """``[rows, features]``: some of the hidden layer."""
        rows, columns = latents[0].shape[0], width_of(features)
        into, hidden = self._mlp.into_hidden, _view(self._hidden, rows, columns)
        if self._activated_at_once:
            gate = self._gate(hidden, latents[0], features) if len(into) > 1 else None
            last = Product(*self._lifting(latents[-1], into[-1], features), hidden)
            return multiply(last, self._mlp.activation, gate)
        if len(into) == 1:
            return activate_(self._mlp.activation, self._lift(hidden, latents[0], into[0], features))
        beside = self._lift(_view(self._beside, rows, columns), latents[0], into[0], features)
        return gate_(self._mlp.activation, self._lift(hidden, latents[1], into[1], features), beside)

    def _gate(self, hidden: Tensor, latent: Tensor, features: slice) -> Tensor | Product:
        """What the activated product is multiplied with: a product, or its result where both factors are copied."""
        if all(proj.rank(projection) % SECTOR for projection in self._mlp.into_hidden):
            return self._lift(hidden, latent, self._mlp.hidden, features)
        return Product(*self._lifting(latent, self._mlp.hidden, features), hidden)

    def _lift(
        self,
        out: Tensor,
        latent: Tensor,
        projection: Projection[Tensor],
        features: slice,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Some features out of rank space, plus these of the residual."""
        return affine_plus(out, *self._lifting(latent, projection, features), residual)

    def _lifting(
        self, latent: Tensor, projection: Projection[Tensor], features: slice
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is multiplied for some features, and their bias; a factor that is copied is there until the next."""
        bias = None if projection.up_bias is None else projection.up_bias[features]
        factor = projection.up[features]
        return latent, _padded(factor, factor.shape[0], latent.shape[1], self._factor), bias


def _padded(factor: Tensor, rows: int, columns: int, memory: Tensor) -> Tensor:
    """``[rows, columns]``: the factor itself, or a copy in ``memory`` with zeros behind its rows or columns."""
    if factor.shape == (rows, columns):
        return factor
    return padded_copy(factor, _view(memory, rows, columns))


def _view(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)


def _add_product(total: Tensor, x: Tensor, weight: Tensor, first: bool) -> None:
    """``total += x @ weight.T`` in float32; ``total`` is uninitialised at the first."""
    if first:
        torch.ops.aten.mm.dtype_out(x, weight.t(), torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, x, weight.t(), torch.float32, out=total)
