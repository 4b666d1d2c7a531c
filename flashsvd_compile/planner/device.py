"""Ceilings of the devices a plan can be made for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a strategy's choice depends on.

    Attributes:
        least_workspace: bytes an operator may always use. On a CPU this is a core's share of the last-level cache, in
            which an intermediate should stay.
        grows: whether the workspace grows with the region's input. A GPU needs chunks that fill it: an input's size
            where rank-space intermediates pass through memory, half of it where kernels keep them on chip.
        max_fused_rank: largest rank whose accumulators the fused kernels hold on chip; 0 where there are none.
    """

    least_workspace: int
    grows: bool
    max_fused_rank: int


_DEVICES = {
    "cpu": Device(least_workspace=4 * 2**20, grows=False, max_fused_rank=0),
    "cuda": Device(least_workspace=2**20, grows=True, max_fused_rank=384),
}


def device_of(name: str) -> Device:
    """The ceilings of a device type, ``"cpu"`` or ``"cuda"``."""
    return _DEVICES[name]
