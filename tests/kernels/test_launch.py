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


def compiled_by_triton(launcher: Callable, tensordesc_meta: list, one_for_all: bool) -> Any:
    """What Triton makes of a kernel with descriptors, as far as a launch beneath its interface looks at it.

    Args:
        one_for_all: as since 3.7.
    """

    def launch(*given):
        return launcher(*given, tensordesc_meta)

    run = SimpleNamespace(launch=launch, global_scratch_size=0, profile_scratch_size=0)
    run.launch_cooperative_grid = run.launch_pdl = False
    if one_for_all:
        run.arg_annotations, run.kernel_signature = "annotations", b"signature"
    return SimpleNamespace(run=run, function=1, packed_metadata=(4, 1, 0))


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


@pytest.mark.parametrize("one_for_all", [False, True], ids=["3.6", "3.7"])
@pytest.mark.parametrize("unread", [False, True], ids=["3.7", "3.8"])
def test_arguments_are_put_together_anew_and_descriptors_encoded_once_an_address(monkeypatch, one_for_all, unread):
    encoded, started = [], []

    def encode(descriptor: Any, metadata: str) -> list:
        encoded.append((descriptor.base.data_ptr(), metadata))
        return [f"{metadata} at {descriptor.base.data_ptr()}", *descriptor.block_shape]

    def encode_unread(descriptor: Any, metadata: str, _: Any) -> list:
        return encode(descriptor, metadata)

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", encode_unread if unread else encode, raising=False)
    x, y = torch.zeros(4, 4), torch.ones(4)
    arguments = (Descriptor(x, [2, 2]), 7, y, Descriptor(x, [4, 4]), x, None)
    compiled = compiled_by_triton(lambda *given: started.append(given), ["first", "second"], one_for_all)
    start = _beneath_descriptors(compiled, (2, 1, 1), _without_tensors((*arguments, 2)))

    def expected(stream: int, x: int, y: int) -> tuple:
        flat = (f"first at {x}", 2, 2, 7, y, f"second at {x}", 4, 4, x, None, 2)
        nothing, metadata = (None,) * 3, (4, 1, 0)
        before = (2, 1, 1, stream, 1, False, False)
        if one_for_all:
            return (*before, metadata, *nothing, None, None, "annotations", b"signature", list(flat))
        return (*before, None, None, metadata, *nothing, *flat)

    for stream, addresses in ((0, (16, 32)), (5, (16, 48)), (5, (64, 48))):
        function, given = start(stream, *addresses)
        function(*given)
        assert started[-1] == expected(stream, *addresses)
    assert encoded == [(16, "first"), (16, "second"), (64, "first"), (64, "second")]
