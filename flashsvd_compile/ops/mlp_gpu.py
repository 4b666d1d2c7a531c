"""A streamed MLP on a GPU: products large enough to fill the chip, whatever the ranks.

Rank space of the whole input is computed first, into the memory of the result. Then a chunk of rows at a time passes
through ranges of the hidden layer, whose contributions are summed in float32. Rows and ranges are cut so that the
library's tiles leave few processors idle.

The library multiplies slowly where a rank is no multiple of 8: 4096 rows take five times as long at rank 1493 as at
1496; and a third longer than need be where rows begin at half sectors of memory. There a range of a factor at a time is
copied, padded with zeros, used and overwritten by the next.

Where a kernel activates what it multiplies, a gate is multiplied last and over the hidden layer, which leaves room for
a longer range. Unless both factors are copied, one launch multiplies gate and hidden layer, a tile of them at a time.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.operands import Product
from ..kernels.padding import padded_copy
from ..kernels.product import SECTOR, multiplies, multiply, reads_fast
from ..kernels.target import Target, target_of
from . import norm
from . import projection as proj
from .activation import activate_, gate_
from .aligned import padded, padded_bias
from .mlp_region import Mlp
from .norm import Norm
from .projection import Projection
from .workspace import affine_into, affine_plus, rows_that_fit

LEAST_ROWS = 128
"""With fewer rows copying factors costs more than multiplying them slowly."""


def supported(x: Tensor, mlp: Mlp) -> bool:
    """Half precision, low-rank members, rows enough, and a result that has room for the rank space of its rows."""
    features = proj.out_features(mlp.out)
    low_rank = all(projection.down is not None for projection in (*mlp.into_hidden, mlp.out))
    if not low_rank or x.element_size() != 2 or x.numel() < LEAST_ROWS * x.shape[-1] or features % SECTOR:
        return False
    return _columns_in_result(mlp)[-1].stop <= features


def _columns_in_result(mlp: Mlp) -> list[slice]:
    """Where in the result's columns the padded rank spaces of hidden layer and gate wait for their turn."""
    ranks = [padded(proj.rank(projection)) for projection in mlp.into_hidden]
    return [slice(stop - rank, stop) for rank, stop in zip(ranks, accumulate(ranks), strict=True)]


class Tile(NamedTuple):
    """Rows, and columns of the hidden layer, that are computed at a time.

    Attributes:
        beside: columns of the second tensor of these rows: the hidden layer beside its gate, the rank space of ``out``.
        copied: elements of a range of a factor where it is copied.
        summed: columns of the float32 sums, if there are several ranges.
        activated: whether products are activated as they are computed.
    """

    rows: int
    columns: int
    beside: int
    copied: int
    summed: int
    activated: bool

    @property
    def elements(self) -> int:
        """Elements of half precision that this takes."""
        return self.rows * (self.columns + self.beside + 2 * self.summed) + self.copied


MAX_RANGES = 16
COPYING, SUMMING, LAUNCHING, IDLENESS = 6, 6, 6_000_000, 0.4
"""Fitted to 45 tiles of seven regions on an H100 and, with the splits, to 21 of three on an H200, to 3 % of these.

The first three in multiplications of one processor, 2.5e12 a second: an element copied by the device, one added to a
float32 sum, the time between two products. The last is the share of the time that idle processors are waited for.
"""
SPLITS, LEAST_DEPTH, SPLITTING = (1, 2, 3), 1024, 0.97
"""Into which the library cuts a deep product whose tiles are few, the least depth of a part, and at what rate."""


def tile_of(mlp: Mlp, rows: int, elements: int, target: Target) -> Tile:
    """The fastest tile within ``elements`` of workspace by the fitted cost; the smallest where none is within it."""
    sizes = _Sizes.of(mlp)
    if _may_be_activated(mlp):
        tile = _tile_of(sizes, rows, elements, target.processors, activated=True)
        if multiplies(target, tile.rows, tile.columns):
            return tile
    return _tile_of(sizes, rows, elements, target.processors, activated=False)


def _may_be_activated(mlp: Mlp) -> bool:
    """Whether the kernel that activates products can read the factors, or their copies, and write the hidden layer."""
    read = all(proj.rank(p) % SECTOR or reads_fast(p.up) for p in mlp.into_hidden)
    return read and mlp.width % 8 == 0


class _Sizes(NamedTuple):
    """What a tile depends on of an MLP.

    Attributes:
        width: of the hidden layer.
        features: of the result.
        rank, ranks: of the projection out of the hidden layer, and of those into it, padded.
        odd: whether a rank is padded.
    """

    width: int
    features: int
    rank: int
    ranks: tuple[int, ...]
    odd: bool

    @classmethod
    def of(cls, mlp: Mlp) -> "_Sizes":
        ranks = [proj.rank(projection) for projection in (mlp.out, *mlp.into_hidden)]
        rank, *into_hidden = map(padded, ranks)
        odd = any(rank % SECTOR for rank in ranks)
        return cls(mlp.width, proj.out_features(mlp.out), rank, tuple(into_hidden), odd)

    def tiles(self, rows: int, columns: int, elements: int, activated: bool) -> list[Tile]:
        """As many rows as ``elements`` of workspace hold with so many columns, and as make for chunks of one size."""
        several = columns < self.width
        one = Tile(
            rows=1,
            columns=columns,
            beside=max(
                columns if len(self.ranks) > 1 and not activated else 0,
                0 if several and columns >= self.rank else self.rank,  # sums are rounded to where the last range was
            ),
            copied=columns * max(self.rank, *self.ranks) if self.odd else 0,
            summed=self.rank if several else 0,
            activated=activated,
        )
        fitting = max(1, (elements - one.copied) // (one.elements - one.copied) // 128) * 128
        even = -(-rows_that_fit(fitting, 1, rows) // 128) * 128
        return [one._replace(rows=chunk) for chunk in {min(rows, fitting), min(rows, even)}]

    def cost(self, tile: Tile, rows: int, processors: int) -> float:
        """Multiplications one after another, chunk by chunk and range by range, as the last may be short ones."""
        chunks, rest = divmod(rows, tile.rows)
        return chunks * self._chunk(tile, tile.rows, processors) + self._chunk(tile, rest, processors)

    def _chunk(self, tile: Tile, rows: int, processors: int) -> float:
        """Of so many rows of a tile."""
        if rows == 0:
            return 0
        hidden = [_width(features) for features in _ranges(self.width, tile.columns)]
        lifted = [_width(features) for features in _ranges(self.features, self.lifted_at_once(tile.columns))]
        products = [(columns, rank) for columns in hidden for rank in self.ranks]
        products += [(self.rank, columns) for columns in hidden] + [(columns, self.rank) for columns in lifted]
        cost = sum(_product_cost(rows, columns, depth, processors) for columns, depth in products)
        cost += len(hidden) * rows * tile.summed * SUMMING
        return cost + len(hidden) * tile.copied * (1 + len(self.ranks)) * COPYING

    def lifted_at_once(self, columns: int) -> int:
        """Features of the result whose factor is copied at a time: evenly cut, no more than a range's columns."""
        if not self.odd:
            return self.features
        ranges = -(-self.features // columns)
        return min(columns, -(-self.features // (ranges * 128)) * 128)


@lru_cache(maxsize=256)
def _tile_of(sizes: _Sizes, rows: int, elements: int, processors: int, activated: bool) -> Tile:
    widths = range(-(-sizes.width // (MAX_RANGES * 128)) * 128, sizes.width + 128, 128)
    tiles = [tile for columns in widths for tile in sizes.tiles(rows, columns, elements, activated)]
    within = [tile for tile in tiles if tile.elements <= elements]
    if not within:
        return min(tiles, key=lambda tile: tile.elements)
    return min(within, key=lambda tile: (sizes.cost(tile, rows, processors), tile.elements))


@lru_cache(maxsize=4096)
def _product_cost(rows: int, columns: int, depth: int, processors: int) -> float:
    """Multiplications one after another of ``[rows, depth] @ [depth, columns]``, by the best of the library's tiles."""

    def of(tile_rows: int, tile_columns: int, share: float, parts: int) -> float:
        tiles = parts * -(-rows // tile_rows) * -(-columns // tile_columns)
        rounds = IDLENESS * -(-tiles // processors) + (1 - IDLENESS) * max(1, tiles / processors)
        rate = share if parts == 1 else share * SPLITTING
        return rounds * tile_rows * tile_columns * depth / parts / rate

    splits = [parts for parts in SPLITS if parts == 1 or depth >= parts * LEAST_DEPTH]
    shapes = (128, 256, 1.0), (128, 192, 0.95), (128, 128, 0.85)
    return LAUNCHING + min(of(*shape, parts) for shape in shapes for parts in splits)


def streamed(
    x: Tensor,
    mlp: Mlp,
    activation: str,
    workspace_bytes: int,
    x_norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The MLP's ``[..., out_features]`` plus the residual, which is contiguous. See :func:`supported`.

    A norm of ``x`` exists for as many rows at a time as the workspace, which is allocated after it, has room for.
    """
    rows_in = x.reshape(-1, x.shape[-1])
    result = x.new_empty((*x.shape[:-1], proj.out_features(mlp.out)))
    rows_out = result.view(-1, result.shape[-1])
    latents = [rows_out[:, columns] for columns in _columns_in_result(mlp)]
    elements = workspace_bytes // x.element_size()
    per_row = 0 if x_norm is None else x.shape[-1]
    for rows in _ranges(rows_in.shape[0], rows_that_fit(elements, per_row, rows_in.shape[0])):
        _into_rank_space([latent[rows] for latent in latents], norm.of_rows(rows_in[rows], x_norm), mlp.into_hidden)
    tile = tile_of(mlp, rows_in.shape[0], elements, target_of(x.device))
    chunks = _Chunks(mlp, activation, tile, like=x)
    for rows in _ranges(rows_in.shape[0], tile.rows):
        added = None if residual is None else residual.view(rows_out.shape)[rows]
        chunks.finish(rows_out[rows], [latent[rows] for latent in latents], added)
    return result


def _into_rank_space(latents: list[Tensor], x: Tensor, projections: list[Projection[Tensor]]) -> None:
    """``latents[rows, padded rank]`` of ``x[rows, features]``, zero where they are padded."""
    for latent, projection in zip(latents, projections, strict=True):
        down = projection.down
        assert down is not None
        if latent.shape[1] > down.shape[0]:
            down = padded_copy(down, down.new_empty(latent.shape[1], down.shape[1]))
        affine_into(latent, x, down, padded_bias(projection.down_bias, latent.shape[1]))


class _Chunks:
    """A chunk of rows at a time from the rank space before the hidden layer to the result, through the same memory."""

    def __init__(self, mlp: Mlp, activation: str, tile: Tile, like: Tensor):
        self._mlp, self._activation, self._columns = mlp, activation, tile.columns
        self._activated_at_once = tile.activated
        self._lifted_at_once = _Sizes.of(mlp).lifted_at_once(tile.columns)
        self._rank = padded(proj.rank(mlp.out))
        self._bias = padded_bias(mlp.out.down_bias, self._rank)
        self._hidden = like.new_empty(tile.rows * tile.columns)
        self._beside = like.new_empty(tile.rows * tile.beside)
        self._factor = like.new_empty(tile.copied)
        self._sums = like.new_empty(tile.rows, tile.summed, dtype=torch.float32)

    def finish(self, out: Tensor, latents: list[Tensor], residual: Tensor | None) -> None:
        """``out[rows, features]``, the residual added; its memory may be where the latents are."""
        latent = self._rank_space_of_out(latents)
        for features in _ranges(out.shape[1], self._lifted_at_once):
            added = None if residual is None else residual[:, features]
            self._lift(out[:, features], latent, self._mlp.out, features, added)

    def _rank_space_of_out(self, latents: list[Tensor]) -> Tensor:
        rows, down = latents[0].shape[0], self._mlp.out.down
        assert down is not None
        sums, beside = self._sums[:rows], self._beside.numel() >= rows * self._rank
        total = _view(self._beside if beside else self._hidden, rows, self._rank)
        for features in _ranges(self._mlp.width, self._columns):
            hidden = self._activated(latents, features)
            factor = self._padded(down[:, features], self._rank, hidden.shape[1])
            if not sums.numel():
                return affine_into(total, hidden, factor, self._bias)
            _add_product(sums, hidden, factor, features.start == 0)
        return total.copy_(sums) if self._bias is None else torch.add(sums, self._bias, out=total)

    def _activated(self, latents: list[Tensor], features: slice) -> Tensor:
        """``[rows, features]``: some of the hidden layer."""
        rows, columns = latents[0].shape[0], _width(features)
        into, hidden = self._mlp.into_hidden, _view(self._hidden, rows, columns)
        if self._activated_at_once:
            gate = self._gate(hidden, latents[0], features) if len(into) > 1 else None
            last = Product(*self._lifting(latents[-1], into[-1], features), hidden)
            return multiply(last, self._activation, gate)
        if len(into) == 1:
            return activate_(self._activation, self._lift(hidden, latents[0], into[0], features))
        beside = self._lift(_view(self._beside, rows, columns), latents[0], into[0], features)
        return gate_(self._activation, self._lift(hidden, latents[1], into[1], features), beside)

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
        return latent, self._padded(factor, factor.shape[0], latent.shape[1]), bias

    def _padded(self, factor: Tensor, rows: int, columns: int) -> Tensor:
        """``[rows, columns]``: the factor itself, or a copy with zeros behind its rows or columns."""
        if factor.shape == (rows, columns):
            return factor
        return padded_copy(factor, _view(self._factor, rows, columns))


def _width(features: slice) -> int:
    return features.stop - features.start


def _ranges(width: int, columns: int) -> list[slice]:
    return [slice(first, min(first + columns, width)) for first in range(0, width, columns)]


def _view(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)


def _add_product(total: Tensor, x: Tensor, weight: Tensor, first: bool) -> None:
    """``total += x @ weight.T`` in float32; ``total`` is uninitialised at the first."""
    if first:
        torch.ops.aten.mm.dtype_out(x, weight.t(), torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, x, weight.t(), torch.float32, out=total)
