"""BERT-base on a CPU, float32: peak activation memory and time of ours against eager and Inductor.

The implementations take turns, so that a machine that slows down for a while slows all of them alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flashsvd_compile.cli.comparison import OURS, Measured, compare

from .attention_region import padding
from .bert import BASE, TINY, build, case
from .measure import Timing
from .models import created_on, dense_of, frozen
from .rows import Case, Row, Target
from .session import Session, run

TARGET = Target(time=1.0, memory=2.8)
"""Time against the best baseline; units, a quarter of eager's 11.2."""
SHAPES = ((4, 512, "none"), (4, 512, "padded"), (1, 2048, "none"), (1, 2048, "padded"))


def cases() -> list[Case]:
    return [case(batch, length, mask, "192/304", BASE, TARGET) for batch, length, mask in SHAPES]


def smoke_cases() -> list[Case]:
    return [case(2, 24, "padded", "192/304", TINY, TARGET)]


def measure(session: Session, case: Case) -> None:
    """All implementations at one case."""
    batch, length = case.shape["B"], case.shape["L"]
    with created_on(session.device, session.dtype):
        factored = frozen(build(case))
        ids = torch.randint(1000, 30000, (batch, length))
    mask = padding(batch, length, session.device).long() if case.mask == "padded" else None

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    measure_on_cpu(session, case, factored, call)


def measure_on_cpu(session: Session, case: Case, factored: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """Add the rows of a case to the session and save them: dense and factored eager, Inductor, ours."""
    found = compare(dense_of(factored), factored, call, session.device, session.samples, warm_ups=1)
    session.rows += [_row(session, case, each) for each in found]
    session.save()


def _row(session: Session, case: Case, measured: Measured) -> Row:
    row = Row.of(case, measured.name, session.dtype_name, ours=measured.name == OURS)
    size = measured.output.element_size()
    row.put_timing(Timing(measured.time_ms, measured.spread_ms, session.samples))
    row.put_memory(measured.peak_bytes, measured.output.numel() * size, case.unit_elements * size)
    row.error = measured.error
    return row


if __name__ == "__main__":
    run("cpu", __doc__, measure, cases(), smoke_cases())
