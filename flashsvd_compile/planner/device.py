"""Ceilings of the devices a plan can be made for."""

from dataclasses import dataclass, replace

ODD_RANKS = 2.0
"""Factor on a GPU library's time at odd ranks; up to 6 at large factors (H200, 16384 rows), but Inductor pads some."""


@dataclass(frozen=True)
class Device:
    """What a strategy's choice depends on.

    Attributes:
        flops: operations a second of a large product, by bytes of an element; an addition and a multiplication are two.
        library_single_flops: those of the library in float32, where our kernels are faster; else ``None``.
        bandwidth: bytes a second of what passes through memory, reads and writes counted; more than a copy reaches
            where some of it is still in the cache.
        chunk_seconds: what one more chunk of rows costs: its products fill the device and drain it again.
        launch_seconds: what an operation costs before and after it fills the device; a chunk of keys and values is two.
        least_workspace: bytes an operator may always use. On a CPU this is a core's share of the last-level cache, in
            which an intermediate should stay.
        grows: whether the workspace grows with the region's input. A GPU needs chunks that fill it.
        max_fused_rank: largest rank whose accumulators the fused kernels hold on chip; 0 where there are none.
        max_projected_rank: the same of the kernel for keys and values, above which the library is faster.
        max_single_head: largest head to which our kernel attends in float32; wider ones are left to the library.
        full_rate_rank: largest rank whose keys and values come in chunks as fast as whole; ``None``: any.
        activation_seconds: what an element of the hidden layer costs the fused kernel beside its products, by the
            largest rank up to which it does: steps get shorter, or kernels change.
        specialised: whether there are kernels for it in Gluon: a streamed MLP of half precision has its products
            activated as they are computed, large chunks of keys are lifted faster.
        full_rows: rows that occupy the device; a fused MLP of fewer splits its hidden layer.
        odd_ranks: factor on the time of products of half precision by factors whose rank is no multiple of 8.
    """

    flops: dict[int, float]
    bandwidth: float
    chunk_seconds: float
    launch_seconds: float
    least_workspace: int
    grows: bool
    max_fused_rank: int
    max_projected_rank: int
    max_single_head: int = 0
    full_rate_rank: int | None = None
    activation_seconds: tuple[tuple[int, float], ...] = ()
    full_rows: int = 0
    specialised: bool = False
    library_single_flops: float | None = None
    odd_ranks: float = 1.0

    def as_written(self) -> "Device":
        """The device as the model's own operations find it."""
        found = replace(self, odd_ranks=ODD_RANKS if self.grows else 1.0)
        single = self.library_single_flops
        return found if single is None else replace(found, flops={**self.flops, 4: single}, library_single_flops=None)

    def head_size(self, features: int) -> int:
        """Features that attention computes for a head: on a GPU tiles are powers of two, of at least 16."""
        return max(16, 1 << (features - 1).bit_length()) if self.grows else features


# GPUs: measured (benchmarks/NOTES.md, benchmarks/results); float32 without tf32. CPU: two cores with AVX-512. Only the
# proportions matter to a choice, and they differ little between chips of a kind.
_DEVICES = {
    "cpu": Device(
        flops={4: 280e9, 2: 280e9}, bandwidth=20e9, chunk_seconds=1e-4, launch_seconds=5e-5,
        least_workspace=4 * 2**20, grows=False, max_fused_rank=0, max_projected_rank=0,
    ),
    "H200": Device(
        flops={4: 60e12, 2: 784e12}, library_single_flops=45e12, bandwidth=4.28e12,
        chunk_seconds=15e-6, launch_seconds=1.75e-6, least_workspace=2**20, grows=True,
        max_fused_rank=384, max_projected_rank=256, max_single_head=64, full_rate_rank=192,
        activation_seconds=((256, 0.41e-12), (320, 0.55e-12), (384, 1.2e-12)), full_rows=132 * 128,
        specialised=True,
    ),
}  # fmt: skip


_DEVICES["H100"] = replace(_DEVICES["H200"], flops={4: 60e12, 2: 830e12}, bandwidth=3.75e12)
_ANY_GPU = replace(
    _DEVICES["H200"].as_written(), max_single_head=0, odd_ranks=1.0, max_fused_rank=256, specialised=False
)
_DEVICES["B200"] = replace(_ANY_GPU, max_fused_rank=384)


def device_of(name: str) -> Device:
    """The ceilings of ``"cpu"`` or of a GPU by its name.

    Of a GPU that was not measured, those of an H200 that leaves float32 to the library; it has kernels for lower ranks,
    and none in Gluon.
    """
    return next((device for known, device in _DEVICES.items() if known in name), _ANY_GPU)
