"""What a plan knows of operators and kernels without asking them: a table of sizes, and not what computes with them."""

import pytest

from flashsvd_compile.kernels import attention, gemv, mlp, product, short_attention, tiles
from flashsvd_compile.kernels.target import KNOWN
from flashsvd_compile.ops import aligned, lifting
from flashsvd_compile.ops.mlp import GPU_COLUMNS
from flashsvd_compile.planner import memory, shapes, time
from flashsvd_compile.planner.device import device_of

H200 = device_of("H200")
LIMITS = {
    "columns of a float32 MLP": (memory.SINGLE_COLUMNS, GPU_COLUMNS),
    "keys of short attention": (memory.SHORT_KEYS, short_attention.MAX_KEYS),
    "rows for which odd ranks are copied": (memory.LEAST_COPIED, aligned.LEAST_ROWS_TO_COPY),
    "elements of a sector": (memory.ALIGNED, product.SECTOR),
    "elements that the library reads at once": (memory.STEP, aligned._STEP),
    "rank that is lifted by a kernel": (H200.max_projected_rank, lifting.MAX_PROJECTED_RANK),
    "rows of decoding": (shapes.FEW_ROWS, gemv.MAX_ROWS),
    "queries of three warpgroups": (time.TILE_ROWS, attention.SPECIALISED_ROWS[64]),
    "keys from which on they attend": (time.LONG_KEYS, attention.SPECIALISED_KEYS),
    "share of rounds that their tiles fill": (time.EVEN_SHARE, attention.EVEN_SHARE),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_plan_and_what_it_plans_agree(what):
    planned, actual = LIMITS[what]
    assert planned == actual


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", "sm_80"),
        ("NVIDIA GeForce RTX 4090", "sm_89"),
        ("NVIDIA H100 80GB HBM3", "sm_90"),
        ("NVIDIA H200", "sm_90"),
        ("NVIDIA B200", "sm_100"),
        ("NVIDIA GeForce RTX 5090", "sm_120"),
        ("AMD Instinct MI300X", "gfx942"),
    ],
)
def test_a_plan_fuses_ranks_that_the_chip_has_a_kernel_for(name, chip):
    fused = [rank for rank in range(1, tiles.MAX_RANK + 1) if mlp.tiles_of(KNOWN[chip], rank, rank, itemsize=2)]
    assert device_of(name).max_fused_rank == max(fused)
