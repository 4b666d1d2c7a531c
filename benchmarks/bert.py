"""BERT-base, forward: ours against {factored, dense} x {eager, Inductor} with and without CUDA graphs."""

import argparse

import torch
from torch import nn

from .attention_region import padding
from .baselines import float64_reference, measure_case, micro_batched, standard, step_of_equal_memory
from .models import Ranks, bert, created_on, dense_of, frozen
from .rows import Case, Target
from .session import Session, run

UNITS_TO_REACH = 2.6
SHAPES = {(32, 128): 0.90, (32, 512): 0.75, (64, 512): 0.75, (8, 2048): 0.75, (1, 8192): 0.75}
RANKS = {
    "192/304": Ranks(attention=192, output=192, mlp=304),
    "48 a head": Ranks(attention=48, output=208, mlp=256, per_head=True),
    "40 a head": Ranks(attention=40, output=240, mlp=240, per_head=True),
    "48*12 whole": Ranks(attention=576, output=208, mlp=256),
    "40*12 whole": Ranks(attention=480, output=240, mlp=240),
}
"""The published ranks are read as per head / MLP / output projection."""
TINY_RANKS = {
    "tiny": Ranks(attention=8, output=8, mlp=8),
    "tiny per head": Ranks(attention=4, output=8, mlp=8, per_head=True),
}
BASE = {"layers": 12, "D": 768, "d_ff": 3072, "H": 12}
TINY = {"layers": 2, "D": 48, "d_ff": 96, "H": 2}


def case(batch: int, length: int, mask: str, ranks: str, sizes: dict[str, int], target: Target) -> Case:
    """One row of the table; ``ranks`` names an entry of ``RANKS`` or ``TINY_RANKS``."""
    return Case(
        name=f"{batch}x{length} {mask} {ranks}",
        shape={"B": batch, "L": length, **sizes},
        ranks={"name": ranks, **(RANKS | TINY_RANKS)[ranks].as_dict()},
        unit_elements=batch * length * sizes["D"],
        memory_measure="units",
        mask=mask,
        target=target,
        quick=ranks == "192/304" and mask == "padded" and (batch, length) in ((32, 512), (1, 8192)),
    )


def cases() -> list[Case]:
    """The whole table at ranks 192/304, padded first; the published ranks at 32x512."""
    of_table = [
        case(batch, length, mask, "192/304", BASE, Target(time, UNITS_TO_REACH))
        for mask in ("padded", "none")
        for (batch, length), time in SHAPES.items()
    ]
    published = [
        case(32, 512, mask, ranks, BASE, Target(0.75, UNITS_TO_REACH))
        for ranks in list(RANKS)[1:]
        for mask in ("padded", "none")
    ]
    return of_table + published


def smoke_cases() -> list[Case]:
    """The same code paths in seconds."""
    return [
        case(4, 24, mask, ranks, TINY, Target(1.0, 11.0))
        for mask, ranks in (("padded", "tiny"), ("none", "tiny per head"))
    ]


def build(case: Case) -> nn.Module:
    """The case's factored model, in the ambient device and dtype."""
    ranks = Ranks(**{key: value for key, value in case.ranks.items() if key != "name"})
    shape = case.shape
    return bert(shape["layers"], shape["D"], shape["d_ff"], shape["H"], shape["L"], ranks)


def measure(session: Session, case: Case) -> None:
    """All implementations at one case."""
    batch, length = case.shape["B"], case.shape["L"]
    with created_on(session.device, session.dtype):
        model = frozen(build(case))
        ids = torch.randint(1000, 30000, (batch, length))
    mask = padding(batch, length, session.device).long() if case.mask == "padded" else None

    def call(model: nn.Module, start: int = 0, stop: int = batch) -> torch.Tensor:
        attention_mask = None if mask is None else mask[start:stop]
        return model(input_ids=ids[start:stop], attention_mask=attention_mask).last_hidden_state

    reference = float64_reference(model, call)
    reduce_overhead = session.extra.reduce_overhead and session.device.type == "cuda"
    measure_case(session, case, standard(model, dense_of(model), call, reduce_overhead=reduce_overhead), reference)
    step = step_of_equal_memory(session, case, batch, bound=UNITS_TO_REACH) if session.extra.micro_batch else None
    if step is not None:
        measure_case(session, case, [micro_batched("factored inductor", model, call, batch, step)], reference)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What costs a compilation more and is thus asked for."""
    parser.add_argument("--reduce-overhead", action="store_true", help='mode="reduce-overhead" beside captured graphs')
    parser.add_argument("--micro-batch", action="store_true", help="Inductor micro-batched to the memory of ours")


if __name__ == "__main__":
    run("bert", __doc__, measure, cases(), smoke_cases(), arguments)
