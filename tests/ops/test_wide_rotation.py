"""Half-precision heads rotated by float32 tables, as models do that upcast around their rotation."""

import pytest
import torch

from flashsvd_compile import ops
from flashsvd_compile.errors import DtypeError
from flashsvd_compile.ops.attention import reference

from .accuracy import assert_within_error_rule
from .regions import attention_arguments, rotation

NAMES = [argument.name for argument in ops.attention._schema.arguments]
COS, SIN = NAMES.index("cos"), NAMES.index("sin")


def with_tables(rotary_dim: int, cos_dtype: torch.dtype, sin_dtype: torch.dtype, **how) -> tuple:
    arguments = list(attention_arguments(rotary_dim=rotary_dim, **how))
    arguments[COS], arguments[SIN] = (
        table.to(dtype)
        for table, dtype in zip(
            rotation(1, arguments[0].shape[1], rotary_dim, torch.float32), (cos_dtype, sin_dtype), strict=True
        )
    )
    return tuple(arguments)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rotation_is_computed_in_float32(dtype, rotary_dim, interleaved):
    arguments = with_tables(rotary_dim, torch.float32, torch.float32, dtype=dtype, interleaved=interleaved)
    assert_within_error_rule(ops.attention(*arguments), reference, arguments)
    torch.library.opcheck(ops.attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_tables_have_one_dtype():
    with pytest.raises(DtypeError, match=r"sin has dtype torch\.bfloat16, expected torch\.float32"):
        ops.attention(*with_tables(4, torch.float32, torch.bfloat16, dtype=torch.bfloat16))
