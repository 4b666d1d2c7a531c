"""The attention region alone: ``x[B, L, D]`` to low-rank q, k, v with biases to heads, no output projection."""

import torch

from .baselines import float64_reference, measure_case, standard
from .models import Attention, created_on, dense_of, frozen
from .regions import forced_attention
from .rows import Case, Target
from .session import Session, run


def case(
    batch: int,
    length: int,
    heads: int,
    features: int,
    rank: int,
    target: Target,
    mask: str,
    quick: bool = False,
    of: str = "",
) -> Case:
    """One row of the table; ``of`` says in its name what tells it from others of its size and mask."""
    return Case(
        name=f"{batch}x{length} {mask}{of}",
        shape={"B": batch, "L": length, "D": features, "H": heads},
        ranks={"q": rank, "k": rank, "v": rank},
        unit_elements=batch * length * features,
        memory_measure="transient_mib",
        mask=mask,
        target=target,
        quick=quick,
    )


WIDE = 4096
"""Features whose heads are of 128."""
MASKS = ("none", "padded", "causal")
TARGETS = {
    (32, 512): Target(0.95, 36),
    (8, 2048): Target(0.95, 36),
    (1, 8192): Target(0.95, 18),
    (1, 32768): Target(1.0, 60),
}
CASES = [
    case(batch, length, 12, 768, 192, target, mask, quick=length in (512, 8192) and mask != "causal")
    for mask in MASKS
    for (batch, length), target in TARGETS.items()
]
CASES += [
    case(batch, length, 32, WIDE, 1024, Target(1.0), mask, of=f" {WIDE}")
    for batch, length in ((1, 4096), (4, 2048))
    for mask in ("none", "causal")
]
"""Those of a Llama; no target of TARGETS.md is of them alone."""
SMOKE_CASES = [case(2, 24, 2, 32, 8, Target(1.0, 1), mask, quick=True) for mask in MASKS]
WORKSPACES_MIB = {768: (4, 16, 34, 58), WIDE: (32, 48, 64, 128), 32: (1,)}


def padding(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """``[batch, length]`` bool, false on the last eighth."""
    return (torch.arange(length, device=device) < length - length // 8).expand(batch, length).contiguous()


def measure(session: Session, case: Case) -> None:
    """All implementations at one case."""
    batch, length, features, heads = (case.shape[key] for key in ("B", "L", "D", "H"))
    key_padding = padding(batch, length, session.device) if case.mask == "padded" else None
    with created_on(session.device, session.dtype):
        module = Attention(features, heads, case.ranks["q"], causal=case.mask == "causal")
        x = torch.randn(batch, length, features)
    frozen(module)
    reference = float64_reference(module, lambda m: m(x.double(), key_padding))
    found = standard(module, dense_of(module), lambda m: m(x, key_padding), eager_graph=True)
    forced = forced_attention(module, x, key_padding, WORKSPACES_MIB[features])
    measure_case(session, case, [*found, *forced], reference)


if __name__ == "__main__":
    run("attention_region", __doc__, measure, CASES, SMOKE_CASES)
