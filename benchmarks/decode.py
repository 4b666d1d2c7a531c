"""One token through 16 Llama-7B-sized layers without attention: how close to reading every weight once.

The floor is the factored weights' bytes over the measured copy bandwidth. The ratios are to the best of all baselines,
a captured eager graph and dense weights included, which is stricter than the table's comparison with Inductor.
"""

import torch
from torch import nn

from .baselines import float64_reference, measure_case, standard
from .models import Ranks, created_on, decoder_without_attention, dense_of, frozen
from .rows import Case, Target
from .session import Session, run

COPY_BYTES_PER_SECOND = 4.28e12
"""Of one H200, read plus written."""
RANKS = Ranks(attention=1024, output=1024, mlp=1493)
BASE = {"layers": 16, "D": 4096, "d_ff": 11008}
TINY = {"layers": 2, "D": 32, "d_ff": 80}


def case(batch: int, ranks: Ranks, sizes: dict[str, int], target: Target) -> Case:
    """One row of the table."""
    return Case(
        name=f"batch {batch}",
        shape={"B": batch, "L": 1, **sizes},
        ranks=ranks.as_dict(),
        unit_elements=batch * sizes["D"],
        memory_measure="units",
        target=target,
        floor_ms=weight_elements(ranks, sizes) * 2 / COPY_BYTES_PER_SECOND * 1e3,
        quick=batch == 1,
    )


def weight_elements(ranks: Ranks, sizes: dict[str, int]) -> int:
    """Elements of all factors: four square projections and three of the MLP, a layer."""
    features, width = sizes["D"], sizes["d_ff"]
    square = 3 * ranks.attention + ranks.output
    return sizes["layers"] * (square * 2 * features + 3 * ranks.mlp * (features + width))


CASES = [case(1, RANKS, BASE, Target(1 / 2.0)), case(8, RANKS, BASE, Target(1 / 3.0))]
SMOKE_CASES = [case(2, Ranks(attention=8, output=8, mlp=8), TINY, Target(0.5))]


def measure(session: Session, case: Case) -> None:
    """All implementations at one case."""
    shape = case.shape
    with created_on(session.device, session.dtype):
        model = decoder_without_attention(shape["layers"], shape["D"], shape["d_ff"], Ranks(**case.ranks))
        x = torch.randn(shape["B"], 1, shape["D"])
    frozen(model)

    def call(model: nn.Module) -> torch.Tensor:
        return model(x)

    reference = float64_reference(model, lambda m: m(x.double()))
    on_cuda = session.device.type == "cuda"
    found = standard(model, dense_of(model), call, eager_graph=True, reduce_overhead=on_cuda)
    measure_case(session, case, found, reference)


if __name__ == "__main__":
    run("decode", __doc__, measure, CASES, SMOKE_CASES)
