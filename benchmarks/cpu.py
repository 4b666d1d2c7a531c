"""BERT-base on a CPU, float32: peak activation memory and time of ours against eager and Inductor.

The implementations take turns, so that a machine that slows down for a while slows all of them alike.
"""

import torch
from torch import nn

from flashsvd_compile.cli.comparison import OURS, Measured
from flashsvd_compile.cli.comparison import compare as measure_in_turns

from .attention_region import padding
from .bert import BASE, TINY, build, case
from .measure import Timing, isolated
from .models import created_on, dense_of, frozen
from .rows import Case, Row, Target
from .session import Session, parse

TARGET = Target(time=1.05, memory=4.5)
"""Time against the best baseline; units, 0.4 of eager's 11.2."""
SHAPES = ((4, 512, "none"), (4, 512, "padded"), (1, 2048, "padded"))


def cases() -> list[Case]:
    return [case(batch, length, mask, "192/304", BASE, TARGET) for batch, length, mask in SHAPES]


def smoke_cases() -> list[Case]:
    return [case(2, 24, "padded", "192/304", TINY, TARGET)]


def measure(session: Session, case: Case) -> list[Row]:
    """All implementations at one case."""
    batch, length = case.shape["B"], case.shape["L"]
    with created_on(session.device, session.dtype):
        factored = frozen(build(case))
        ids = torch.randint(1000, 30000, (batch, length))
    mask = padding(batch, length, session.device).long() if case.mask == "padded" else None

    def run(model: nn.Module) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    measured = measure_in_turns(dense_of(factored), factored, run, session.device, session.samples, warm_ups=1)
    return [_row(session, case, each) for each in measured]


def _row(session: Session, case: Case, measured: Measured) -> Row:
    row = Row.of(case, measured.name, session.dtype_name, ours=measured.name == OURS)
    size = measured.output.element_size()
    row.put_timing(Timing(measured.time_ms, measured.spread_ms, session.samples))
    row.put_memory(measured.peak_bytes, measured.output.numel() * size, case.unit_elements * size)
    row.error, row.first_call_s = measured.error, measured.first_call_s
    return row


def main() -> None:
    session = parse("cpu", __doc__)
    session.device = torch.device("cpu")
    for chosen in session.select(smoke_cases() if session.smoke else cases()):
        with isolated(session.device):
            session.rows += measure(session, chosen)
        session.save()
    session.show()


if __name__ == "__main__":
    main()
