"""Llama-7B-like prefill: four layers, RoPE, causal; without padding and padded on the right, and filling a cache."""

import torch
from torch import nn

from .attention_region import padding
from .baselines import float64_reference, measure_case, standard
from .models import Ranks, created_on, dense_of, frozen, llama
from .rows import Case, Target
from .session import Session, run

RANKS = Ranks(attention=1024, output=1024, mlp=1493)
BASE = {"layers": 4, "D": 4096, "d_ff": 11008, "H": 32}
TINY = {"layers": 2, "D": 32, "d_ff": 80, "H": 2}
SHAPES = {(1, 4096): 0.75, (4, 2048): 0.75, (1, 16384): 0.60}


def case(batch: int, length: int, mask: str, ranks: Ranks, sizes: dict[str, int], target: Target) -> Case:
    """One row of the table."""
    return Case(
        name=f"{batch}x{length} {mask}",
        shape={"B": batch, "L": length, **sizes},
        ranks=ranks.as_dict(),
        unit_elements=batch * length * sizes["D"],
        memory_measure="units",
        mask=mask,
        target=target,
        quick=mask == "causal" and length == 4096,
    )


CASES = [
    case(batch, length, mask, RANKS, BASE, Target(time, 4.0))
    for mask in ("causal", "causal padded")
    for (batch, length), time in SHAPES.items()
]
CASES += [case(1, 4096, mask, RANKS, BASE, Target(1.0, 12.0)) for mask in ("cached", "cached padded")]
"""A cache holds a unit of keys and one of values for each layer."""
SMOKE_CASES = [
    case(2, 24, mask, Ranks(attention=8, output=8, mlp=8), TINY, Target(1.0, 12.0))
    for mask in ("causal", "causal padded", "cached")
]


def measure(session: Session, case: Case) -> None:
    """All implementations at one case."""
    shape = case.shape
    batch, length = shape["B"], shape["L"]
    with created_on(session.device, session.dtype):
        ranks = Ranks(**case.ranks)
        model = frozen(llama(shape["layers"], shape["D"], shape["d_ff"], shape["H"], length, ranks))
        ids = torch.randint(0, 32000, (batch, length))
    mask = padding(batch, length, session.device).long() if "padded" in case.mask else None

    def call(model: nn.Module) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache="cached" in case.mask).last_hidden_state

    measure_case(session, case, standard(model, dense_of(model), call), float64_reference(model, call))


if __name__ == "__main__":
    run("llama", __doc__, measure, CASES, SMOKE_CASES)
