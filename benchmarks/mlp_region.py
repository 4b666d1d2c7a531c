"""The MLP region alone: down, up, activation, down, up of ``x[N, D]``, every baseline against each strategy of ours."""

import torch

from .baselines import float64_reference, measure_case, micro_batched, standard, step_of_equal_memory
from .models import Mlp, created_on, dense_of, frozen
from .regions import forced_mlp
from .rows import Case, Target
from .session import Session, run


def case(
    n: int, features: int, width: int, rank: int, target: Target, gated: bool = False, quick: bool = False
) -> Case:
    """One row of the table."""
    kind = " swiglu" if gated else ""
    return Case(
        name=f"N={n} D={features} R={rank}{kind}",
        shape={"N": n, "D": features, "d_ff": width, "gated": int(gated)},
        ranks={"hidden": rank, "out": rank},
        unit_elements=n * features,
        memory_measure="transient_mib",
        target=target,
        quick=quick,
    )


BERT_TARGETS = {
    96: Target(0.48, 48),
    192: Target(0.68, 64),
    256: Target(0.70, 80),
    304: Target(0.85, 96),
    384: Target(0.90, 120),
}
CASES = [
    *(case(65536, 768, 3072, rank, target, quick=rank in (192, 384)) for rank, target in BERT_TARGETS.items()),
    case(8192, 768, 3072, 192, Target(1.0), quick=True),
    case(16384, 4096, 11008, 1024, Target(1.0, 64)),
    case(16384, 4096, 11008, 1024, Target(1.0, 64), gated=True),
]
SMOKE_CASES = [
    case(64, 32, 128, 8, Target(0.5, 48), quick=True),
    case(48, 32, 96, 8, Target(1.0, 64), gated=True),
]
WORKSPACES_MIB = {768: (16, 40, 64, 112), 4096: (32, 64, 128), 32: (1,)}


def measure(session: Session, case: Case) -> None:
    """All implementations at one case."""
    n, features, width, gated = (case.shape[key] for key in ("N", "D", "d_ff", "gated"))
    with created_on(session.device, session.dtype):
        module = Mlp(features, width, case.ranks["hidden"], bool(gated), bias=features == 768)
        x = torch.randn(n, features)
    frozen(module)
    reference = float64_reference(module, lambda m: m(x.double()))
    found = standard(module, dense_of(module), lambda m: m(x), eager_graph=True)
    measure_case(session, case, [*found, *forced_mlp(module, x, WORKSPACES_MIB[features])], reference)
    step = step_of_equal_memory(session, case, n, bound=2.0) if session.script == "mlp_region" else None
    if step is not None:
        micro = micro_batched("factored inductor", module, lambda m, start, stop: m(x[start:stop]), n, step)
        measure_case(session, case, [micro], reference)


if __name__ == "__main__":
    run("mlp_region", __doc__, measure, CASES, SMOKE_CASES)
