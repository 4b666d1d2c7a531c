"""``kernels.projection`` against its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashsvd_compile.kernels import projection
from flashsvd_compile.kernels.tiles import MAX_RANK
from flashsvd_compile.ops import projection as proj
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import projection as random_projection
from tests.ops.regions import random

LAYOUTS = ("contiguous", "transposed", "strided")


def reference(x: Tensor, *factors: Tensor | None) -> Tensor:
    return proj.apply(x, proj.Projection(*factors))  # pyright: ignore[reportArgumentType]


def as_map(p: proj.Projection[Tensor], out: Tensor) -> projection.Map:
    return projection.Map(p.down, p.down_bias, p.up, p.up_bias, out)  # pyright: ignore[reportArgumentType]


def assert_right(x: Tensor, projections: list[proj.Projection], chip: str) -> None:
    """Each destination is the middle of a wider matrix, whose borders must stay as they are."""
    margin = 8
    shapes = [(len(x), proj.out_features(p) + 2 * margin) for p in projections]
    wide = [torch.full(shape, float("nan"), dtype=x.dtype) for shape in shapes]
    maps = [as_map(p, out[:, margin:-margin]) for p, out in zip(projections, wide, strict=True)]
    with running_on(INTERPRETED[chip]):
        projection.project(x, *maps)
    for p, out in zip(projections, wide, strict=True):
        assert out[:, :margin].isnan().all() and out[:, -margin:].isnan().all()
        assert_within_error_rule(out[:, margin:-margin].contiguous(), reference, (x, *p), ulps=2)


@given(
    rows=st.integers(4, 150),
    depth=st.integers(8, 150),
    shapes=st.lists(st.tuples(st.integers(1, 140), st.integers(8, 150)), min_size=1, max_size=2),
    bias=st.booleans(),
    down_bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    chip=st.sampled_from(tuple(INTERPRETED)),
)
def test_any_shape(rows, depth, shapes, chip, **how):
    """Few blocks of rows, so that several programs share their columns."""
    x = random(rows, depth, dtype=torch.float16)
    how["dtype"] = torch.float16
    assert_right(x, [random_projection(depth, features, rank, **how) for rank, features in shapes], chip)


@pytest.mark.parametrize("ranks", [(304,), (384,), (192, 96), (5, 192), (304, 20)])
def test_ranks_of_several_pieces(ranks):
    x = random(130, 96, dtype=torch.float16)
    how = {"down_bias": True, "dtype": torch.float16}
    assert_right(x, [random_projection(96, 72, rank, **how) for rank in ranks], "descriptors")


@pytest.mark.parametrize("chip", INTERPRETED)
@pytest.mark.parametrize("biases", [(False, True), (True, False)])
def test_two_maps_with_biases_of_their_own(chip, biases):
    x = random(33, 40, dtype=torch.float16)
    maps = [random_projection(40, 50, 20, bias=b, down_bias=not b, dtype=torch.float16) for b in biases]
    assert_right(x, maps, chip)


@pytest.mark.parametrize("rank", [1, 20, 96])
def test_float32(rank):
    x = random(37, 50, dtype=torch.float32)
    assert_right(x, [random_projection(50, 70, rank, down_bias=True)], "pointers")


@pytest.mark.parametrize("chip", INTERPRETED)
@pytest.mark.parametrize("rows", [1, 64, 129, 300])
def test_in_place(chip, rows):
    x = random(rows, 160, dtype=torch.float16)
    p = random_projection(160, 160, 20, dtype=torch.float16)
    written = x.clone()
    with running_on(INTERPRETED[chip]):
        projection.project(written, as_map(p, written))
    assert_within_error_rule(written, reference, (x, *p), ulps=2)


@pytest.mark.parametrize("chip", INTERPRETED)
def test_expanded_biases(chip):
    """One number for all features."""
    down, _, up, _ = random_projection(40, 50, 20, dtype=torch.float16)
    one = random(1, dtype=torch.float16)
    assert_right(random(9, 40, dtype=torch.float16), [proj.Projection(down, one.expand(20), up, one.expand(50))], chip)


def test_rows_apart_from_each_other():
    """A slice of a wider matrix, with NaN between its rows."""
    wide = torch.full((40, 80), float("nan"), dtype=torch.float16)
    x = wide[:, 8:56]
    x.copy_(random(40, 48, dtype=torch.float16))
    for chip in INTERPRETED:
        assert_right(x, [random_projection(48, 30, 12, dtype=torch.float16)], chip)


@pytest.mark.parametrize("chip", INTERPRETED)
def test_ranks_without_a_configuration_are_not_supported(chip):
    device = torch.device("cpu")
    with running_on(INTERPRETED[chip]):
        assert not projection.supported([0], torch.float16, device)
        assert not projection.supported([16, MAX_RANK + 1], torch.float16, device)
        assert projection.supported([128, 16], torch.float16, device)
