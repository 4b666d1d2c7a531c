"""Projections in Gluon on a Hopper GPU: every element written, nothing else, and right by the error rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels import projection_hopper
from flashsvd_compile.kernels.launch import launch, listening
from flashsvd_compile.kernels.projection import SPECIALISED_RANKS, Map, project
from flashsvd_compile.kernels.projection_hopper import project_hopper
from flashsvd_compile.kernels.target import KNOWN
from flashsvd_compile.kernels.tiles import with_aligned_rows
from flashsvd_compile.ops import projection as proj
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import projection as random_projection
from tests.ops.regions import random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER
BORDER = 8


def reference(x, *factors):
    return proj.apply(x, proj.Projection(*factors))


def factors_of(depth, width, rank, *, bias=True, down_bias=True, dtype=torch.bfloat16) -> proj.Projection[Any]:
    factors = random_projection(depth, width, rank, bias=bias, down_bias=down_bias, dtype=dtype)
    return proj.Projection(*(f if f is None else f.cuda() for f in factors))


def as_map(p: proj.Projection[Any], out: Tensor) -> Map:
    assert p.down is not None
    return Map(with_aligned_rows(p.down), p.down_bias, with_aligned_rows(p.up), p.up_bias, out)


def assert_right(x: Tensor, *projections: proj.Projection) -> None:
    """Each result is the middle of a matrix of NaN, of which the rest must stay."""
    wide = []
    for p in projections:
        columns = -(-proj.out_features(p) // BORDER) * BORDER + 2 * BORDER
        wide.append(torch.full((len(x) + 300, columns), torch.nan, dtype=x.dtype, device="cuda"))
    outs = [w[: len(x), BORDER : BORDER + proj.out_features(p)] for p, w in zip(projections, wide, strict=True)]
    maps = [as_map(p, out) for p, out in zip(projections, outs, strict=True)]
    project_hopper(x, *maps)
    for p, out, around in zip(projections, outs, wide, strict=True):
        assert_within_error_rule(out.contiguous(), reference, (x, *p))
        out.fill_(torch.nan)
        assert around.isnan().all()


def rows_of(rows, depth, dtype=torch.bfloat16):
    return random(rows, depth, dtype=dtype).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(192,), (208,), (192, 192), (48, 256), (64, 240), (1, 17), (192,) * 3, (48, 256, 3)])
@pytest.mark.parametrize("rows", [1, 129, 1000, 20000])
@pytest.mark.parametrize("bias", [False, True])
def test_ranks(dtype, ranks, rows, bias):
    how = {"bias": bias, "down_bias": bias, "dtype": dtype}
    assert_right(rows_of(rows, 768, dtype), *(factors_of(768, 768, rank, **how) for rank in ranks))


@pytest.mark.parametrize("rank", [16, 32, 80, 96, 112, 128, 144, 160, 176, 224, 256])
@pytest.mark.parametrize("rows", [500, 33000])
def test_pieces_of_a_rank(rank, rows):
    assert_right(rows_of(rows, 256), factors_of(256, 320, rank))


@pytest.mark.parametrize("width", [64, 8, 104, 520, 776, 1000])
@pytest.mark.parametrize("depth", [64, 8, 100, 520, 776])
@pytest.mark.parametrize(("rows", "ranks"), [(130, (96,)), (300, (192, 40)), (17000, (192,)), (16000, (100, 128))])
def test_widths_and_depths(rows, ranks, width, depth):
    x = with_aligned_rows(rows_of(rows, depth))
    assert_right(x, *(factors_of(depth, width, rank) for rank in ranks))


@pytest.mark.parametrize("rows", [1, 300, 9000, 20000])
def test_maps_of_their_own_widths_and_biases(rows):
    some = [factors_of(520, 776, 144, bias=True, down_bias=False), factors_of(520, 64, 100, bias=False, down_bias=True)]
    for projections in (some, some[::-1], [*some, factors_of(520, 200, 120)], [factors_of(520, 200, 120), *some[::-1]]):
        assert_right(rows_of(rows, 520), *projections)


@pytest.mark.parametrize("rank", [96, 192, 256])
@pytest.mark.parametrize("rows", [1, 64, 129, 3584, 20000, 33000])
def test_in_place(rank, rows):
    for features in (768, 520):
        p = factors_of(features, features, rank)
        wide = torch.full((rows + 300, features + 2 * BORDER), torch.nan, dtype=torch.bfloat16, device="cuda")
        x = wide[:rows, BORDER:-BORDER]
        given = rows_of(rows, features)
        x.copy_(given)
        project_hopper(x, as_map(p, x))
        assert_within_error_rule(x.contiguous(), reference, (given, *p))
        x.fill_(torch.nan)
        assert wide.isnan().all()


@pytest.mark.parametrize("rows", [200, 20000])
def test_columns_of_a_wider_matrix(rows):
    """What lies beside and below ``x`` is not looked at."""
    wide = torch.full((rows + 300, 704), torch.nan, dtype=torch.bfloat16, device="cuda")
    x = wide[:rows, 8:528]
    x.copy_(rows_of(rows, 520))
    assert_right(x, factors_of(520, 768, 192), factors_of(520, 768, 192))


@pytest.mark.parametrize(("rows", "maps", "height"), [
    (3584, 1, 1), (16384, 1, 1), (32768, 1, 2), (34000, 1, 1), (8192, 2, 1), (16384, 2, 2),
])  # fmt: skip
def test_long_blocks_where_they_end_at_the_same_time(rows, maps, height, monkeypatch):
    seen = {}

    def recorded(kernel, grid, *arguments, **constants):
        seen.update(constants)
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(projection_hopper, "launch", recorded)
    monkeypatch.setattr(projection_hopper, "target_of", lambda device: KNOWN["sm_90"])
    assert_right(rows_of(rows, 256), *(factors_of(256, 768, 128) for _ in range(maps)))
    assert seen["HEIGHT"] == height


def launched(x: Tensor, *maps: Map) -> str:
    """The kernel that takes the maps."""
    with one_launch() as launches:
        project(x, *maps)
    return launches[0].kernel.__name__


@pytest.mark.parametrize("rank", [SPECIALISED_RANKS.start, 48, 192, SPECIALISED_RANKS.stop - 1, 304])
@pytest.mark.parametrize(("width", "stride"), [(768, 784), (768, 771), (764, 784)])
def test_taken_where_it_can_write(rank, width, stride):
    x, p = rows_of(16384, 768), factors_of(768, width, rank)
    around = torch.full((len(x), stride), torch.nan, dtype=x.dtype, device="cuda")
    out = around[:, :width]
    taken = launched(x, as_map(p, out)) == "projection_hopper_kernel"
    assert taken == (width % 8 == 0 and stride % 8 == 0 and rank in SPECIALISED_RANKS)
    assert_within_error_rule(out.contiguous(), reference, (x, *p))
    assert around[:, width:].isnan().all()


@pytest.mark.parametrize(("rows", "maps"), [(4096, 1), (4096, 2), (8192, 1), (8192, 2), (16384, 1)])
def test_taken_where_it_occupies_the_chip(rows, maps):
    x, factors = rows_of(rows, 768), [factors_of(768, 768, 192) for _ in range(maps)]
    taken = launched(x, *(as_map(p, torch.empty_like(x)) for p in factors)) == "projection_hopper_kernel"
    assert taken == (rows * maps >= 16384)


@pytest.mark.parametrize("rank", [96, 304])
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("rows", [700, 4096, 20000])
def test_reading_ahead_of_a_launch_that_writes_neither_rows_nor_factors(rank, maps, rows):
    """A result is not written before the launch before has read what stood there."""
    x, projections = rows_of(rows, 768), [factors_of(768, 768, rank) for _ in range(maps)]
    before = rows_of(rows, 768)
    outs = [before.clone() for _ in range(maps)]
    slow, read = factors_of(768, 768, 256), [torch.empty_like(x) for _ in range(maps)]
    for out, copy in zip(outs, read, strict=True):
        project(out, as_map(slow, copy))
    project(x, *(as_map(p, out) for p, out in zip(projections, outs, strict=True)), ahead=True)
    for p, out, copy in zip(projections, outs, read, strict=True):
        assert_within_error_rule(out, reference, (x, *p))
        assert_within_error_rule(copy, reference, (before, *slow))


@pytest.mark.parametrize("copied", ["down", "bias"])
def test_what_has_to_be_copied_is_not_read_ahead(copied):
    x, out = rows_of(4096, 768), torch.empty(4096, 768, dtype=torch.bfloat16, device="cuda")
    down, up, bias = rows_of(93, 776)[:, :768], rows_of(768, 96)[:, :93], rows_of(2, 768)[0]
    if copied == "down":
        down = rows_of(93, 769)[:, :768]
    else:
        bias = rows_of(768, 2)[:, 0]
    for _ in range(20):
        torch.cuda.synchronize()
        project(x, Map(down, None, up, bias, out), ahead=True)
        assert_within_error_rule(out, reference, (x, down, None, up, bias))


@pytest.mark.parametrize("maps", [1, 2, 3])
def test_launched_again_for_other_tensors(maps):
    first, second = ([rows_of(20000, 768), *(rows_of(20000, 768) for _ in range(maps))] for _ in range(2))
    projections = [factors_of(768, 768, 192) for _ in range(maps)]
    recorded = []
    with listening(lambda launch, tensors: recorded.append((launch, tensors))):
        project(first[0], *(as_map(p, out) for p, out in zip(projections, first[1:], strict=True)))
    ((again, tensors),) = recorded
    others = {one.data_ptr(): other for one, other in zip(first, second, strict=True)}
    again.again(*(others.get(tensor.data_ptr(), tensor) for tensor in tensors))
    for p, out in zip(projections, second[1:], strict=True):
        assert_within_error_rule(out, reference, (second[0], *p))


@pytest.mark.parametrize("rank", [48, 96, 160, 192, 208, 240, 256])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "maps"), [(3000, 1), (32768, 1), (32768, 2), (4096, 3)])
def test_nothing_spills(rank, bias, rows, maps):
    """With the tests of cross-compilation this is seen under every Triton that is known."""
    with one_launch() as launches:
        assert_right(rows_of(rows, 768), *(factors_of(768, 768, rank, bias=bias, down_bias=bias) for _ in range(maps)))
    assert launches[0].compiled.n_spills == 0
