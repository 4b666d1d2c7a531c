"""Which products rotate the heads that they lift, and which come two in a launch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels import product
from flashsvd_compile.kernels.operands import Product, Rotation
from flashsvd_compile.kernels.target import KNOWN

from .chips import running_on

HALF = torch.bfloat16


def matrix(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def rotates(
    rows: int = 4096,
    columns: int = 4096,
    rank: int = 1024,
    head: int = 128,
    positions: int = 4096,
    first: int = 0,
    wraps: bool = False,
    dtype: torch.dtype = HALF,
    table: torch.dtype = HALF,
) -> bool:
    lifting = Product(
        matrix(rows, rank, dtype=dtype), matrix(columns, rank, dtype=dtype), None, matrix(rows, columns, dtype=dtype)
    )
    tables = [matrix(positions, head, dtype=table) for _ in range(2)]
    return product.rotates(lifting, Rotation(tables[0], tables[1], first), wraps)


TAKEN: list[dict[str, Any]] = [
    {},
    {"positions": 1000, "rows": 1000},
    {"rows": 8192, "positions": 2048, "wraps": True},
    {"rows": 4160, "positions": 4096, "first": 4160, "wraps": True},
]
REFUSED: list[dict[str, Any]] = [
    {"rows": 128},  # too few tiles
    {"head": 64},
    {"columns": 4160},  # half a head
    {"rank": 1000},  # rows begin half a sector off
    {"table": torch.float32},
    {"dtype": torch.float32, "table": torch.float32},  # for which there is a kernel without a rotation
    {"rows": 8000, "positions": 2000, "wraps": True},  # 64 rows of two items
    {"rows": 1366, "positions": 2048, "first": 1366, "wraps": True},
]


@pytest.mark.parametrize(("how", "taken"), [*((how, True) for how in TAKEN), *((how, False) for how in REFUSED)])
def test_rotates(how, taken, monkeypatch):
    monkeypatch.setattr(product, "speaks_gluon", lambda target: target.name == "sm_90")
    with running_on(KNOWN["sm_90"]):
        assert rotates(**how) == taken
    with running_on(KNOWN["sm_80"]):
        assert not rotates(**how)


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "faster"),
    [
        (4096, 768, 192, True),
        (1024, 1024, 1024, True),
        (1366, 768, 1024, False),  # more than one round of an H200
        (1366, 4096, 1024, False),
        (1024, 2048, 512, False),
        (16384, 768, 192, False),  # either fills the chip
    ],
)
def test_two_products_come_in_a_launch_where_that_was_measured_to_be_faster(rows, depth, columns, faster):
    pair = [Product(matrix(rows, depth), matrix(columns, depth), None, matrix(rows, columns)) for _ in range(2)]
    with running_on(KNOWN["sm_90"]):
        assert product.multiplies_pair_faster(*pair) == faster
