"""What the kernels need to know about a chip."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Target(NamedTuple):
    """Features and limits of one GPU architecture.

    Attributes:
        name: ``"sm_90"``, ``"gfx942"`` or ``"interpreter"``.
        shared_memory: bytes of shared memory one program may use.
        processors: multiprocessors of the device at hand; how many programs run side by side.
        descriptors: tiles are best loaded through tensor descriptors (TMA).
        hardware_tanh: ``tanh.approx.f32`` exists.
        overlapping: a launch may begin before the one before it ends (programmatic dependent launch).
        triple_tf32: tensor cores multiply float32, in three products of tf32, faster than the vector units do in one
            and no less exactly. Of other chips than sm_90 it is not known how exactly they add.
    """

    name: str
    shared_memory: int
    processors: int
    descriptors: bool
    hardware_tanh: bool
    overlapping: bool = False
    triple_tf32: bool = False


# Shared memory per block: CUDA programming guide, table "technical specifications per compute capability"; LDS of
# CDNA 3: AMD instruction set reference, 64 KiB.
_KIB = 1024
KNOWN = {
    "sm_80": Target("sm_80", 163 * _KIB, 108, False, True),
    "sm_86": Target("sm_86", 99 * _KIB, 84, False, True),
    "sm_89": Target("sm_89", 99 * _KIB, 128, False, True),
    "sm_90": Target("sm_90", 227 * _KIB, 132, True, True, True, triple_tf32=True),
    "sm_100": Target("sm_100", 227 * _KIB, 148, True, True, True),
    "sm_120": Target("sm_120", 99 * _KIB, 170, False, True, True),
    "gfx942": Target("gfx942", 64 * _KIB, 304, False, False),
    "interpreter": Target("interpreter", 227 * _KIB, 4, False, False),
}
_SMALLEST = Target("unknown", 48 * _KIB, 32, False, False)


TRITONS = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Versions of Triton that kernels in Gluon, an experiment of it, and launches beneath its interface were run with."""


def knows_triton() -> bool:
    """Whether the Triton at hand is one of :data:`TRITONS`."""
    return tuple(map(int, triton.__version__.split(".")[:2])) in TRITONS


def speaks_gluon(target: Target) -> bool:
    """Whether kernels in Gluon run: on Hopper, under a Triton that is known.

    Their modules are imported only where they run. A Hopper chip without its tanh is one that the interpreter plays,
    which has no Gluon.
    """
    return target.name == "sm_90" and target.hardware_tanh and knows_triton()


_stood_for: ContextVar[torch.device | None] = ContextVar("stood_for", default=None)


@contextmanager
def standing_for(device: torch.device) -> Iterator[None]:
    """Take tensors on the meta device for tensors on this one, in this thread."""
    token = _stood_for.set(device)
    try:
        yield
    finally:
        _stood_for.reset(token)


def target_of(device: torch.device) -> Target:
    """The target behind a device; a CPU means Triton's interpreter."""
    stood_for = _stood_for.get() if device.type == "meta" else None
    return _target_of(stood_for or device)


@cache
def _target_of(device: torch.device) -> Target:
    if device.type == "cpu":
        return KNOWN["interpreter"]
    properties = torch.cuda.get_device_properties(device)
    nvidia = f"sm_{properties.major}{properties.minor}"
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    known = KNOWN.get(name, _SMALLEST)
    return known._replace(name=name, processors=properties.multi_processor_count)


@cache
def environment(device: torch.device) -> dict[str, str | int | bool]:
    """What a kernel depends on beside its launch: the chip, the compilers, a digest of the kernels and their tables."""
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    versions = {"torch": str(torch.__version__), "triton": triton.__version__}
    return {"chip": chip, **versions, "kernels": sources.hexdigest()[:16]}


def describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor may read it: contiguous rows of 16-byte aligned addresses and distances, not one row
    again and again.
    """
    *strides, step = tensor.stride()
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides)
    return step == 1 and tensor.data_ptr() % 16 == 0 and aligned


LEAST_SHARE = 0.75
"""Least share of the processors that a persistent kernel's tiles occupy; others and the library have smaller tiles."""


def occupies(target: Target, tiles: int) -> bool:
    """Whether so many tiles, one a processor, keep the chip busy."""
    return tiles >= LEAST_SHARE * target.processors


TRIPLE = "tf32x3"
"""``input_precision`` of ``tl.dot`` that multiplies float32 in three products of tf32."""


def allows_tf32() -> bool:
    """Whether products of float32 may be rounded to tf32, by whichever of PyTorch's interfaces the user said so.

    ``torch.get_float32_matmul_precision`` raises an error where that was ``torch.backends``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision_of(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 is rounded to tf32 only where the user allows it."""
    return "tf32" if dtype != torch.float32 or allows_tf32() else "ieee"
