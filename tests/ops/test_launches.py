"""Golden files: what an H200 is given to do for a region. ``EXPECTTEST_ACCEPT=1 pytest`` accepts what has changed.

Meta tensors stand for those of the GPU, and nothing is launched.
"""

import re
from contextlib import ExitStack
from importlib import import_module
from itertools import groupby
from typing import Any
from unittest.mock import patch

import pytest
import sympy
import torch
from expecttest import TestCase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashsvd_compile.kernels import rotary
from flashsvd_compile.kernels.launch import SECOND_AXIS, launch
from flashsvd_compile.kernels.target import KNOWN, knows_triton
from flashsvd_compile.ops import norm as normalisation
from flashsvd_compile.options import Options
from flashsvd_compile.passes.input_norm import OF_STREAM
from flashsvd_compile.planner import AttentionShape, plan_attention
from tests.kernels.chips import modules_with, running_on

from .regions import attention_arguments, mlp_arguments, norm, packed_linear_arguments

pytestmark = pytest.mark.skipif(not knows_triton(), reason="other kernels for a Triton that is not known")

NO_WORK = ("aten::empty", "aten::new_empty")
HALF: dict[str, Any] = {"dtype": torch.bfloat16}
BERT: dict[str, Any] = HALF | {"num_heads": 12, "head_dim": 64, "ranks": (192,) * 4, "workspace_bytes": 24 << 20}
with torch.device("meta"):
    RMS = norm("rms", 4096, **HALF)
LLAMA: dict[str, Any] = HALF | {"x_norm": RMS, "bias": False, "residual": True, "workspace_bytes": 32 << 20}


class Work(TorchDispatchMode):
    """Notes launches, with their grids, and the library's calls."""

    def __init__(self):
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if not func.is_view and not name.startswith(NO_WORK):
            self.noted.append(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def launch(self, kernel, grid, *arguments, **options) -> None:
        self.noted.append(f"{kernel.fn.__name__} {grid[0]}x{grid[1]}")

    def rms_norm(self, x: Tensor, *arguments) -> Tensor:
        """One kernel on a GPU, several operations of meta tensors."""
        self.noted.append("rms_norm")
        return x.new_empty(x.shape)


def work(operator: str, arguments_of, *shape, **how) -> str:
    """What the operator's implementation for a GPU does, a line each."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        arguments, mode = arguments_of(*shape, **how), Work()
        stack.enter_context(running_on(KNOWN["sm_90"]))
        stack.enter_context(patch.object(normalisation, "rms_norm", mode.rms_norm))
        for module in modules_with(launch):
            stack.enter_context(patch.object(module, "launch", mode.launch))
        stack.enter_context(mode)
        import_module(f"flashsvd_compile.ops.{operator}")._cuda(*arguments)
    runs = [(line, len(list(same))) for line, same in groupby(mode.noted)]
    return "\n".join(line if count == 1 else f"{line}, {count} times" for line, count in runs)


@pytest.mark.parametrize(("batch", "length"), [(8192, 128), (6000, 128), (5462, 100)])
def test_many_short_items_fit_in_a_grid(batch, length):
    """As frames of videos are."""
    launched = work("attention", attention_arguments, batch, length, None, 768, **BERT | {"workspace_bytes": 4 << 30})
    grids = [int(items) for items in re.findall(r"short_attention_kernel \d+x(\d+)", launched)]
    assert len(grids) > 1 and max(grids) <= SECOND_AXIS


def test_many_items_fit_in_a_grid_that_rotates():
    heads, table = (torch.empty(shape, device="meta") for shape in ((2048, 4, 33, 64), (1, 4, 64)))
    per_item = table.expand(2048, 4, 64)
    for cos in (table, per_item):
        grids: list[tuple[int, int]] = []
        with patch.object(rotary, "launch", lambda kernel, grid, *_, **__: grids.append(grid)):  # noqa: B023
            rotary.rotate_(heads, cos, cos, interleaved=False)
        assert [items_and_heads for _, items_and_heads in grids] == [1985 * 33, 63 * 33]


def test_keys_of_no_tokens_are_left_to_the_library():
    how = HALF | {"num_heads": 4, "head_dim": 64, "ranks": (32,) * 4}
    assert "short_attention_kernel" not in work("attention", attention_arguments, 2, 8, 0, 256, **how)


class Launches(TestCase):
    maxDiff = None

    def attention(self, *shape, **how) -> str:
        return work("attention", attention_arguments, *shape, **how)

    def mlp(self, *shape, **how) -> str:
        return work("mlp", mlp_arguments, *shape, **how)

    def test_bert(self):
        self.assertExpectedInline(
            self.attention(32, 512, None, 768, **BERT),
            """\
projection_hopper_kernel 128x1, 2 times
attention_kernel 1536x1
projection_hopper_kernel 128x1
attention_kernel 1536x1
projection_hopper_kernel 128x1""",
        )

    def test_padded_bert(self):
        padding = torch.empty(32, 512, dtype=torch.bool, device="meta")
        self.assertExpectedInline(
            self.attention(32, 512, None, 768, key_padding=padding, **BERT),
            """\
projection_hopper_kernel 128x1
key_bounds_kernel 32x1
projection_hopper_kernel 128x1
attention_kernel 1536x1
projection_hopper_kernel 128x1
attention_kernel 1536x1
projection_hopper_kernel 128x1""",
        )

    def test_short_bert(self):
        self.assertExpectedInline(
            self.attention(32, 128, None, 768, **BERT),
            """\
small_products_kernel 128x1
projection_kernel 64x2
short_attention_kernel 1x384
projection_kernel 64x1""",
        )

    def test_long_bert(self):
        self.assertExpectedInline(
            self.attention(1, 8192, None, 768, **BERT),
            """\
projection_kernel 128x1
projection_hopper_kernel 128x1
attention_hopper_kernel 132x1
projection_kernel 128x1""",
        )

    def test_bert_with_factors_multiplied(self):
        how = BERT | {"ranks": (600,) * 4, "strategy": "merged"}
        self.assertExpectedInline(
            self.attention(32, 512, None, 768, **how),
            """\
small_products_kernel 108x1
addmm.out, 2 times
attention_kernel 1536x1
addmm.out
attention_kernel 1536x1
mm
copy_
addmm.out""",
        )

    def test_bert_in_float32(self):
        self.assertExpectedInline(
            self.attention(32, 512, None, 768, **BERT | {"dtype": torch.float32, "workspace_bytes": 96 << 20}),
            """\
product_single_kernel 768x1
product_single_kernel 3072x1
product_pair_kernel 768x1
product_pair_kernel 3072x1
attention_kernel 768x1
product_pair_kernel 768x1
product_pair_kernel 3072x1
attention_kernel 768x1
product_single_kernel 768x1
product_single_kernel 3072x1""",
        )

    def llama(self, batch: int, length: int) -> str:
        """With the workspace that the plan and the norm's stream make."""
        ranks: dict[str, int | None] = dict.fromkeys(("q", "k", "v", "out"), 1024)
        d, b, n = map(sympy.Integer, (4096, batch, length))
        features = dict.fromkeys(ranks, 4096)
        shape = AttentionShape(ranks, features, d, 2, "NVIDIA H200", {}, b, n, n, 32, 32, masked=True, causal=True)
        planned = plan_attention(shape, Options()).workspace.bytes_for(shape.input_elements)
        how = LLAMA | {"num_heads": 32, "head_dim": 128, "rotary_dim": 128, "window": (-1, 0), "ranks": (1024,) * 4}
        how |= {"workspace_bytes": int(planned + OF_STREAM * 2 * shape.input_elements)}
        return self.attention(batch, length, None, 4096, **how)

    def test_short_llama(self):
        self.assertExpectedInline(
            self.llama(4, 2048),
            """\
rms_norm
mm.out, 3 times
product_hopper_kernel 132x1, 2 times
mm.out
attention_hopper_kernel 132x1
rms_norm
mm.out, 3 times
product_hopper_kernel 132x1, 2 times
mm.out
attention_hopper_kernel 132x1
mm.out
product_hopper_kernel 132x1""",
        )

    def test_llama(self):
        self.assertExpectedInline(
            self.llama(1, 4096),
            """\
rms_norm
mm.out, 3 times
product_hopper_kernel 132x1
rms_norm
mm.out, 3 times
product_hopper_kernel 132x1, 2 times
mm.out
attention_hopper_kernel 132x1
product_hopper_kernel 132x1
mm.out
attention_hopper_kernel 132x1
mm.out
product_hopper_kernel 132x1""",
        )

    def test_fused_mlp_of_bert(self):
        how = HALF | {"width": 3072, "out_features": 768, "ranks": (192, None, 192)}
        self.assertExpectedInline(
            self.mlp(32, 512, 768, strategy="fused", **how),
            """\
mm.out
mlp_core_kernel 128x1
addmm.out""",
        )

    def test_streamed_mlp_of_bert(self):
        how = HALF | {"width": 3072, "out_features": 768, "ranks": (600, None, 600), "workspace_bytes": 48 << 20}
        self.assertExpectedInline(
            self.mlp(32, 512, 768, **how),
            """\
padding_kernel 38x3
mm.out
padding_kernel 192x3
product_hopper_kernel 132x1
product_hopper_kernel 126x1
product_hopper_kernel 132x1
product_hopper_kernel 129x1
product_hopper_kernel 132x1
product_hopper_kernel 129x1
padding_kernel 48x3
padding_kernel 1024x3
addmm.out""",
        )

    def test_mlp_of_llama(self):
        how = LLAMA | {"width": 11008, "out_features": 4096, "ranks": (1493,) * 3, "gated": True}
        how |= {"activation": "silu", "workspace_bytes": 96 << 20}
        self.assertExpectedInline(
            self.mlp(1, 4096, 4096, **how),
            """\
rms_norm
padding_kernel 94x16
mm.out
padding_kernel 94x16
mm.out
padding_kernel 688x6, 2 times
product_hopper_kernel 132x1
product_hopper_kernel 60x1
product_hopper_kernel 132x1
product_hopper_kernel 66x1
product_hopper_kernel 132x1
product_hopper_kernel 66x1
padding_kernel 256x6, 2 times
product_hopper_kernel 132x1""",
        )

    def test_a_row_of_llama(self):
        how = LLAMA | {"width": 11008, "out_features": 4096, "ranks": (1024,) * 3, "gated": True}
        self.assertExpectedInline(
            self.mlp(1, 4096, activation="silu", **how),
            """\
gemv_kernel 512x1
gemv_kernel 2752x1
gemv_kernel 256x1
gemv_kernel 512x1""",
        )

    def test_eight_rows_of_llama(self):
        how = LLAMA | {"ranks": (1493,) * 3}
        self.assertExpectedInline(
            work("packed_linear", packed_linear_arguments, 8, 4096, **how),
            """\
gemv_hopper_kernel 264x1
gemv_kernel 24x1
add_.Tensor""",
        )
