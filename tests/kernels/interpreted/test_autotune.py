"""Tuning with the real kernels: every tile it tries is right, and what it tries them on is nobody else's memory."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels.autotune import Tuner, tuning
from flashsvd_compile.ops.attention import _cuda as attention_on_gpu
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.mlp import _cuda as mlp_on_gpu
from flashsvd_compile.ops.mlp import reference as mlp_reference
from tests.kernels.chips import INTERPRETED, running_on
from tests.kernels.clocks import LastIsFastest, Unused
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import attention_arguments, mlp_arguments, padding

HALF = torch.float16


def cases() -> dict[str, tuple]:
    """Operator, its reference, arguments and the kernels that it launches."""
    heads: dict[str, Any] = {"num_heads": 2, "head_dim": 16, "ranks": (12, 10, 9, 11), "dtype": HALF}
    mask, long_mask = padding(33, 20, total=33), padding(140, 20, total=140)
    mlp = mlp_arguments(70, 40, width=80, out_features=40, ranks=(24, None, 20), strategy="fused", dtype=HALF)
    short = attention_arguments(2, 33, None, 32, key_padding=mask, **heads)
    heads |= {"num_kv_heads": 1, "window": (-1, 0), "workspace_bytes": 1 << 20}
    long = attention_arguments(2, 140, None, 32, key_padding=long_mask, **heads)
    return {
        "mlp": (mlp_on_gpu, mlp_reference, mlp, {"mlp_core"}),
        "short attention": (attention_on_gpu, attention_reference, short, {"short_attention", "projection"}),
        "attention": (attention_on_gpu, attention_reference, long, {"attention", "projection"}),
    }


@pytest.mark.parametrize("name", cases())
def test_operators_with_tuned_tiles(name, tmp_path):
    operator, reference, arguments, kernels = cases()[name]
    given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    with running_on(INTERPRETED["descriptors"]):
        by_the_table = operator(*arguments)
        with tuning(Tuner(tmp_path, LastIsFastest())):
            first, second = operator(*arguments), operator(*arguments)
        with tuning(Tuner(tmp_path, Unused())):
            elsewhere = operator(*arguments)
    assert_within_error_rule(first, reference, arguments, ulps=2)
    for result in (second, elsewhere):
        assert torch.equal(result, first)
    torch.testing.assert_close(first, by_the_table)
    for before, after in zip(given, arguments, strict=True):
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after
    choices = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert {choice["problem"]["kernel"] for choice in choices} == kernels
    assert all(choice["share_of_time"] < 1 for choice in choices)
    # A program that replaces its input writes all columns of its rows: a problem of its own, of the last projection.
    in_place = [choice["problem"]["in_place"] for choice in choices if choice["problem"]["kernel"] == "projection"]
    assert sum(in_place) == ("projection" in kernels)


def test_nothing_is_tuned_in_the_interpreter(tmp_path):
    operator, _, arguments, _ = cases()["mlp"]
    with running_on(INTERPRETED["descriptors"]):
        by_the_table = operator(*arguments)
        with tuning(Tuner(tmp_path)):
            assert torch.equal(operator(*arguments), by_the_table)
    assert not list(tmp_path.iterdir())
