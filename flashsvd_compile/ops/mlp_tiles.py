"""How a GPU cuts a streamed MLP: rows and columns of the hidden layer at a time, chosen by a fitted cost."""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from ..kernels.product import SECTOR, multiplies, reads_fast
from ..kernels.target import Target
from . import projection as proj
from .aligned import padded
from .mlp_region import Mlp
from .ranges import ranges, width_of
from .workspace import rows_that_fit

BLOCK = 128
"""Rows of the library's tiles, and of ours."""


def even_ranges(rows: int, most: int) -> list[slice]:
    """At most so many rows at a time, whose blocks differ by one at most."""
    blocks, number = -(-rows // BLOCK), -(-rows // most)
    bounds = [min(rows, blocks * i // number * BLOCK) for i in range(number + 1)]
    return [slice(first, stop) for first, stop in pairwise(bounds)]


class HiddenTile(NamedTuple):
    """Rows, and columns of the hidden layer, that are computed at a time.

    Attributes:
        beside: columns of the second tensor of these rows: the hidden layer beside its gate, the rank space of ``out``.
        copied: elements of a range of a factor where it is copied.
        summed: columns of the float32 sums, if there are several ranges.
        activated: whether products are activated as they are computed.
        kept: whether ``copied`` are whole factors into the hidden layer, which are there for all chunks; those are as
            even as may be.
    """

    rows: int
    columns: int
    beside: int
    copied: int
    summed: int
    activated: bool
    kept: bool = False

    @property
    def elements(self) -> int:
        """Elements of half precision that this takes."""
        return self.rows * (self.columns + self.beside + 2 * self.summed) + self.copied


MAX_RANGES = 16
MORE_CHUNKS = 3
"""Chunks beyond the fewest that are tried, as fewer rounds of the chip may be faster."""
COPYING, SUMMING, LAUNCHING, IDLENESS = 6, 6, 6_000_000, 0.4
"""Fitted to 45 tiles of seven regions on an H100 and, with the splits, to 21 of three on an H200, to 3 % of these.

The first three in multiplications of one processor, 2.5e12 a second: an element copied by the device, one added to a
float32 sum, the time between two products. The last is the share of the time that idle processors are waited for.
"""
SPLITS, LEAST_DEPTH, SPLITTING = (1, 2, 3), 1024, 0.97
"""Parts that the library cuts the depth of a product of few tiles into, the least depth of a part, and its rate."""


def tile_of(mlp: Mlp, rows: int, elements: int, target: Target) -> HiddenTile:
    """The fastest tile within ``elements`` of workspace by the fitted cost; the smallest where none is within it."""
    sizes = Sizes.of(mlp)
    if _may_be_activated(mlp):
        tile = _tile_of(sizes, rows, elements, target.processors, activated=True)
        if multiplies(target, tile.rows, tile.columns):
            return tile
    return _tile_of(sizes, rows, elements, target.processors, activated=False)


def _may_be_activated(mlp: Mlp) -> bool:
    """Whether the kernel that activates products can read the factors, or their copies, and write the hidden layer."""
    read = all(proj.rank(p) % SECTOR or reads_fast(p.up) for p in mlp.into_hidden)
    return read and mlp.width % 8 == 0


class Sizes(NamedTuple):
    """What a tile depends on of an MLP.

    Attributes:
        width: of the hidden layer.
        features: of the result.
        rank, ranks: of the projection out of the hidden layer, and of those into it, padded.
        odd: whether a rank is padded.
        copied: elements that copies of the factors into the hidden layer hold for each of its columns; ``None`` where
            such copies are not kept, as no kernel reads the factor out of it as it is, or the result has no room for
            that rank space.
    """

    width: int
    features: int
    rank: int
    ranks: tuple[int, ...]
    odd: bool
    copied: int | None = None

    @classmethod
    def of(cls, mlp: Mlp) -> "Sizes":
        ranks = [proj.rank(projection) for projection in (mlp.out, *mlp.into_hidden)]
        rank, *into_hidden = map(padded, ranks)
        sizes = cls(mlp.width, proj.out_features(mlp.out), rank, tuple(into_hidden), any(r % SECTOR for r in ranks))
        down = mlp.out.down
        if not sizes.odd or down is None or not reads_fast(down) or mlp.width % SECTOR or rank > sizes.features:
            return sizes
        return sizes._replace(copied=sum(padded(rank) for rank in ranks[1:] if rank % SECTOR))

    def tiles(self, rows: int, columns: int, elements: int, activated: bool) -> list[HiddenTile]:
        """As many rows as ``elements`` of workspace hold with so many columns, and as make for chunks of one size."""
        several = columns < self.width
        one = HiddenTile(
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
        fitting = max(1, (elements - one.copied) // (one.elements - one.copied) // BLOCK) * BLOCK
        even = -(-rows_that_fit(fitting, 1, rows) // BLOCK) * BLOCK
        return [one._replace(rows=chunk) for chunk in {min(rows, fitting), min(rows, even)}]

    def keeping_copies(self, rows: int, elements: int) -> list[HiddenTile]:
        """Tiles that keep their copies, within ``elements`` of workspace.

        The last factor and the rank space of as many rows must fit where the hidden layer was.
        """
        if self.copied is None:
            return []
        copied = self.width * self.copied
        fitting = (elements - copied) // self.width // BLOCK * BLOCK
        if fitting <= 0:
            return []
        needed = -(-rows // fitting)
        numbers = range(needed, needed + MORE_CHUNKS + 1)
        chunks = {min(rows, -(-rows // (number * BLOCK)) * BLOCK) for number in numbers}
        tiles = [HiddenTile(chunk, self.width, 0, copied, 0, activated=True, kept=True) for chunk in chunks]
        return [tile for tile in tiles if tile.rows * self.width >= (self.features + tile.rows) * self.rank]

    def cost(self, tile: HiddenTile, rows: int, processors: int) -> float:
        """Multiplications one after another, chunk by chunk and range by range, as the last may be short ones."""
        if tile.kept:
            chunks = map(width_of, even_ranges(rows, tile.rows))
            products = [(chunk, *each) for chunk in chunks for each in self._products([self.width])]
            cost = sum(_product_cost(*each, processors) for each in (*products, (rows, self.features, self.rank)))
            return cost + (tile.copied + (self.features + rows) * self.rank) * COPYING
        chunks, rest = divmod(rows, tile.rows)
        return chunks * self._chunk(tile, tile.rows, processors) + self._chunk(tile, rest, processors)

    def _products(self, hidden: list[int]) -> list[tuple[int, int]]:
        """Columns and depths of a chunk's products up to the rank space of ``out``, by ranges of the hidden layer."""
        into = [(columns, rank) for columns in hidden for rank in self.ranks]
        return into + [(self.rank, columns) for columns in hidden]

    def _chunk(self, tile: HiddenTile, rows: int, processors: int) -> float:
        """Cost of a chunk of so many rows, in multiplications of one processor."""
        if rows == 0:
            return 0
        hidden = [width_of(features) for features in ranges(self.width, tile.columns)]
        lifted = [width_of(features) for features in ranges(self.features, self.lifted_at_once(tile.columns))]
        products = self._products(hidden) + [(columns, self.rank) for columns in lifted]
        cost = sum(_product_cost(rows, columns, depth, processors) for columns, depth in products)
        cost += len(hidden) * rows * tile.summed * SUMMING
        return cost + len(hidden) * tile.copied * (1 + len(self.ranks)) * COPYING

    def lifted_at_once(self, columns: int) -> int:
        """Features of the result whose factor is copied at a time: evenly cut, no more than a range's columns."""
        if not self.odd:
            return self.features
        parts = -(-self.features // columns)
        return min(columns, -(-self.features // (parts * 128)) * 128)


@lru_cache(maxsize=256)
def _tile_of(sizes: Sizes, rows: int, elements: int, processors: int, activated: bool) -> HiddenTile:
    widths = range(-(-sizes.width // (MAX_RANGES * 128)) * 128, sizes.width + 128, 128)
    tiles = [tile for columns in widths for tile in sizes.tiles(rows, columns, elements, activated)]
    tiles += sizes.keeping_copies(rows, elements) if activated else []
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
