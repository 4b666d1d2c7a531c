"""Compiling kernels for GPUs that are not there, and reading off the result what it takes of them.

The wrappers in ``flashsvd_compile.kernels`` run as they do on a GPU, on tensors without contents, but where they would
launch a kernel Triton only compiles it. So tiles, signatures and specialisation are exactly those of a launch.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from flashsvd_compile.kernels.launch import launch
from flashsvd_compile.kernels.target import KNOWN

from .chips import modules_with, running_on

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""What Triton calls the chips of ``KNOWN`` that kernels are compiled for."""

LAUNCHING = modules_with(launch)

TENSOR_MEMORY = 512
"""Columns of it that sm_100 has."""


class Usage(NamedTuple):
    """What one program of a compiled kernel takes.

    Attributes:
        shared_memory: bytes.
        tensor_memory: columns; 0 where the chip has none.
        spills: registers of a thread that did not fit and live in memory.
        registers: of a thread.
    """

    shared_memory: int
    tensor_memory: int
    spills: int
    registers: int


def usage_of(compiled: CompiledKernel) -> Usage:
    """Read from the metadata and the machine code of a kernel."""
    by_nvidia = "cubin" in compiled.asm
    spills, registers = _of_nvidia(compiled.asm["cubin"]) if by_nvidia else _of_amd(compiled.asm["amdgcn"])
    return Usage(compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0, spills, registers)


def _of_nvidia(cubin: bytes) -> tuple[int, int]:
    """Spills and registers. The former as the driver counts them: local memory, in which our kernels, without arrays
    and calls, keep nothing else.

    ``LOCAL`` has been zero since registers spill to the stack; the stack frame is the figure that counts.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    return ceil((int(stack) + int(local)) / 4), int(registers)


def _of_amd(assembly: str) -> tuple[int, int]:
    """Spills and registers, from the kernel's metadata at the end of its assembly."""
    counts = re.findall(r"^ *\.[sv]gpr_spill_count: *(\d+)$", assembly, re.MULTILINE)
    scalar, vector = map(int, counts)
    (registers,) = re.findall(r"^ *\.vgpr_count: *(\d+)$", assembly, re.MULTILINE)
    return scalar + vector, int(registers)


class _Driver(NamedTuple):
    """What Triton asks a GPU's driver for before it compiles."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # kernels keep what they compiled by device

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def compiling_for(chip: str) -> Iterator[list[CompiledKernel]]:
    """Compile for a chip of :data:`GPUS` what would be launched; yields the list that the kernels are added to."""
    kernels: list[CompiledKernel] = []

    def compile_only(kernel: Any, grid: tuple[int, int], *arguments: Any, overlapping: bool = False, **constants: Any):
        kernels.append(kernel.run(*arguments, grid=grid, warmup=True, **constants))

    with ExitStack() as stack:
        stack.enter_context(running_on(KNOWN[chip]))
        stack.enter_context(patch.object(driver, "_active", _Driver(GPUS[chip])))
        for module in LAUNCHING:
            stack.enter_context(patch.object(module, "launch", compile_only))
        yield kernels
