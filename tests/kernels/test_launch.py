"""Launches that overlap, and launches made again for other tensors."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton.backends.nvidia.driver as nvidia
from torch import Tensor

from flashsvd_compile.kernels.launch import Launch, _beneath_descriptors, _without_tensors, launch, listening
from flashsvd_compile.kernels.target import KNOWN

from .chips import running_on


class Descriptor:
    """What a launch looks at in a tensor descriptor."""

    def __init__(self, base: Tensor, block_shape: list[int]):
        self.base, self.block_shape = base, block_shape


class Call(NamedTuple):
    grid: tuple[int, int]
    arguments: tuple
    constants: dict[str, Any]


class Kernel:
    """Writes down its launches; compiles to nothing, as under the interpreter."""

    def __init__(self):
        self.calls: list[Call] = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append(Call(grid, arguments, constants))


def compiled_by_triton(launcher: Callable, tensordesc_meta: list) -> Any:
    """What Triton 3.6 makes of a kernel with descriptors, as far as a launch beneath its interface looks at it."""

    def launch(*given):
        return launcher(*given, tensordesc_meta)

    run = SimpleNamespace(launch=launch, global_scratch_size=0, profile_scratch_size=0)
    run.launch_cooperative_grid = run.launch_pdl = False
    return SimpleNamespace(run=run, function=1, packed_metadata=())


def test_a_launch_is_made_again_for_other_tensors_each_given_once():
    kernel, launches = Kernel(), []
    x, y = torch.zeros(4, 4), torch.ones(4)
    with listening(lambda launch, tensors: launches.append((launch, tensors))):
        launch(kernel, (2, 1), Descriptor(x, [2, 2]), 7, y, Descriptor(x, [4, 4]), x, None, BLOCK=2)
    (again, tensors), *others = launches
    assert isinstance(again, Launch) and not again.by_address and not others
    assert [id(tensor) for tensor in tensors] == [id(x), id(y)]

    other_x, other_y = torch.ones(4, 4), torch.zeros(4)
    again.again(other_x, other_y)
    first, second = kernel.calls
    assert (second.grid, second.constants) == (first.grid, first.constants) == ((2, 1), {"BLOCK": 2})
    small, seven, vector, large, matrix, nothing = second.arguments
    assert (small.base, small.block_shape, large.base, large.block_shape) == (other_x, [2, 2], other_x, [4, 4])
    assert vector is other_y and matrix is other_x and (seven, nothing) == (7, None)
    assert first.arguments[0].base is x, "what the first launch was given is untouched"


def test_a_launch_overlaps_where_it_may_and_the_chip_can():
    kernel = Kernel()
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
        with running_on(KNOWN[chip]):
            launch(kernel, (1, 1), torch.zeros(4), overlapping=True)
            launch(kernel, (1, 1), torch.zeros(4))
    options = [call.constants for call in kernel.calls]
    assert options == [{}, {}, {"launch_pdl": True}, {}, {"launch_pdl": True}, {}, {}, {}]


def test_arguments_are_put_together_anew_and_descriptors_encoded_once_an_address(monkeypatch: pytest.MonkeyPatch):
    encoded, started = [], []

    def encode(descriptor: Any, metadata: str) -> list:
        encoded.append((descriptor.base.data_ptr(), metadata))
        return [f"{metadata} at {descriptor.base.data_ptr()}", *descriptor.block_shape]

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", encode, raising=False)
    x, y = torch.zeros(4, 4), torch.ones(4)
    arguments = (Descriptor(x, [2, 2]), 7, y, Descriptor(x, [4, 4]), x, None)
    compiled = compiled_by_triton(lambda *given: started.append(given), ["first", "second"])
    start = _beneath_descriptors(compiled, (2, 1, 1), _without_tensors((*arguments, 2)))

    def flat(x: int, y: int) -> tuple:
        return (f"first at {x}", 2, 2, 7, y, f"second at {x}", 4, 4, x, None, 2)

    for stream, addresses in ((0, (16, 32)), (5, (16, 48)), (5, (64, 48))):
        function, given = start(stream, *addresses)
        function(*given)
        assert started[-1][:4] == (2, 1, 1, stream) and started[-1][-11:] == flat(*addresses)
    assert encoded == [(16, "first"), (16, "second"), (64, "first"), (64, "second")]
