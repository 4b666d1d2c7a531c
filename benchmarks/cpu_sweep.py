"""Both regions on a CPU over ranks and lengths, float32: ours must nowhere be slower than Inductor beyond noise."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from . import attention_region, mlp_region
from .cpu import measure_on_cpu
from .models import Attention, Mlp, created_on, frozen
from .rows import Case
from .session import Session, run
from .sweep import NEVER_SLOWER, attention_case, mlp_case

RANKS = (16, 64, 128, 192, 304, 384, 512)
LENGTHS = (16, 128, 512, 2048, 8192)
RANK_OF_LENGTHS = 192
TOKENS = 2048

CASES = [
    *(mlp_case(f"rank {rank}", TOKENS, rank) for rank in RANKS),
    *(mlp_case(f"length {length}", length, RANK_OF_LENGTHS) for length in LENGTHS),
    *(attention_case(f"rank {rank}", 512, rank, TOKENS) for rank in RANKS),
    *(attention_case(f"length {length}", length, RANK_OF_LENGTHS, min(TOKENS, length)) for length in LENGTHS),
]
SMOKE_CASES = [
    replace(mlp_region.SMOKE_CASES[0], name="mlp rank 8", target=NEVER_SLOWER),
    replace(attention_region.SMOKE_CASES[0], name="attention length 24", target=NEVER_SLOWER),
]


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """The region's module and its input."""
    shape, features = case.shape, case.shape["D"]
    if "d_ff" in shape:
        return Mlp(features, shape["d_ff"], case.ranks["hidden"]), torch.randn(shape["N"], features)
    return Attention(features, shape["H"], case.ranks["q"]), torch.randn(shape["B"], shape["L"], features)


def measure(session: Session, case: Case) -> None:
    """All implementations at one point."""
    with created_on(session.device, session.dtype):
        module, x = build(case)

    def call(model: nn.Module) -> Tensor:
        return model(x.to(next(model.parameters()).dtype))

    measure_on_cpu(session, case, frozen(module), call)


if __name__ == "__main__":
    run("cpu_sweep", __doc__, measure, CASES, SMOKE_CASES)
