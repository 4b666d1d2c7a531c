"""Launching kernels, and launching them again for other tensors without Triton's look at every argument.

Triton binds, specialises and looks up for each launch what depends on the arguments' types and alignment only, and
encodes every tensor descriptor anew: 60 to 230 us, many times the launch itself. A :class:`Launch` keeps the outcome.

Where the chip can (programmatic dependent launch, CUDA programming guide), an overlapping launch begins while the one
before it on the stream still runs: its programs take the processors that become free, read what that does not write,
and wait in :func:`take_turn`. Where there is nothing to read ahead this gains little (``benchmarks/NOTES.md``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from inspect import getclosurevars, signature
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import ahead
from .target import knows_triton, target_of

Listener = Callable[["Launch", list[Tensor]], None]
"""Called with a launch and its tensors, each once."""

REMEMBERED = 256
"""Sets of addresses that arguments are kept for, and addresses that a descriptor is: a few calls in each of the layers
that share a recording."""

SECOND_AXIS = 65535
"""The most programs along the second axis of a grid (CUDA programming guide, technical specifications)."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@triton.constexpr_function
def _overlaps():
    """Whether launches overlap on the chip that is compiled for."""
    return not knobs.runtime.interpret and tl.target_info.cuda_capability_geq(9)


@triton.jit
def take_turn():
    """Wait for the launch before this one to be complete and its results to be seen, then let the next one begin.

    In this order, so that when a kernel begins, all but the launch right before it is complete. Each program of an
    overlapping launch takes its turn before it writes anything or reads what the launch before it writes.
    """
    if _overlaps():
        gdc_wait()
        gdc_launch_dependents()


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, overlapping: bool = False, **constants: Any) -> None:
    """Launch a ``@triton.jit`` kernel, and tell :func:`listening` about it; or only compile it, see :mod:`.ahead`.

    Args:
        kernel: the kernel.
        grid: programs along both axes.
        arguments: its leading arguments by position.
        overlapping: begin while the launch before it runs, where the chip can; the kernel calls :func:`take_turn`.
        constants: the remaining arguments and the compiler's options by name.
    """
    beneath = (_beneath(argument) for argument in arguments)
    tensors = list({id(tensor): tensor for tensor in beneath if isinstance(tensor, Tensor)}.values())
    if overlapping and target_of(tensors[0].device).overlapping:
        constants["launch_pdl"] = True
    if ahead.is_rehearsed():
        return ahead.take(kernel.run(*arguments, grid=grid, warmup=True, **constants))
    ahead.finish()
    compiled = kernel[grid](*arguments, **constants)
    listener = _listener.get()
    if listener is not None:
        listener(Launch(kernel, compiled, grid, arguments, constants), tensors)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` after every :func:`launch` of this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_listened_to() -> bool:
    """Whether somebody is told about each launch of this thread."""
    return _listener.get() is not None


class Call(NamedTuple):
    """What is left of a launch once all is known: ``function(*arguments)``."""

    function: Callable[..., None]
    arguments: tuple


class Launch:
    """One launch apart from where its tensors are. It holds no tensor.

    Attributes:
        kernel, compiled: the kernel, and what Triton made of it; ``None`` under its interpreter.
        by_address: whether ``prepare`` takes addresses; Triton's interpreter needs the tensors.
        prepare: the call for a stream and other tensors of the same shapes, strides, dtypes and alignment, each given
            once and in the same order: takes their addresses, or themselves.
    """

    def __init__(self, kernel: Any, compiled: Any, grid: tuple[int, int], arguments: tuple, constants: dict[str, Any]):
        self.kernel, self.compiled = kernel, compiled
        self.by_address = compiled is not None
        self.prepare: Callable[..., Call]
        if self.by_address:
            # What a compiled kernel takes: all of the kernel's parameters in their order, no compiler's options.
            rest = kernel.arg_names[len(arguments) :]
            arguments = (*arguments, *(constants[name] for name in rest))
            by_interface = _beneath_descriptors if knows_triton() and torch.version.hip is None else _as_published
            self.prepare = by_interface(compiled, (*grid, 1), _without_tensors(arguments))
        else:
            template, start = _without_tensors(arguments), partial(kernel[grid], **constants)
            self.prepare = lambda stream, *operands: Call(start, tuple(_filled(template, operands)))

    def on(self, tensors: Sequence[Tensor]) -> Call:
        """The call for these tensors, which have to be alive when it is made, on the current stream."""
        if self.by_address:
            return self.prepare(current_stream(), *(tensor.data_ptr() for tensor in tensors))
        return self.prepare(0, *tensors)

    def again(self, *tensors: Tensor) -> None:
        """Launch for these tensors."""
        function, arguments = self.on(tensors)
        function(*arguments)


def current_stream() -> int:
    """The current device's current stream, as kernels take it."""
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def calls_of(launches: Sequence[tuple[Launch, Sequence[tuple[int, int]]]]) -> Callable[..., Sequence[Call]]:
    """The calls of launches that follow one another, as a function of the stream and a few addresses.

    A model's tensors are mostly where they were at the last call. So what the launches are given is kept for sets of
    addresses, and one look brings all of them.

    Args:
        launches: each with its operands: which of the addresses, and bytes behind it.
    """

    @lru_cache(REMEMBERED)
    def calls(stream: int, *addresses: int) -> list[Call]:
        return [
            launch.prepare(stream, *(addresses[which] + offset for which, offset in operands))
            for launch, operands in launches
        ]

    return calls


def _is_descriptor(argument: Any) -> bool:
    """Whether it is a tensor descriptor: Triton's, or Gluon's, whose module is an experiment and not imported here."""
    return hasattr(argument, "block_shape")


def _beneath(argument: Any) -> Any:
    """A descriptor's tensor; anything else itself."""
    return argument.base if _is_descriptor(argument) else argument


class _Operand(NamedTuple):
    """Stands for a tensor among a launch's arguments: which of the tensors."""

    place: int


def _without_tensors(arguments: tuple) -> list:
    """The arguments with an operand in the place of each tensor and beneath each descriptor."""
    places: dict[int, _Operand] = {}
    template = []
    for argument in arguments:
        tensor = _beneath(argument)
        if isinstance(tensor, Tensor):
            operand = places.setdefault(id(tensor), _Operand(len(places)))
            argument = operand if argument is tensor else _at(argument, operand)
        template.append(argument)
    return template


def _filled(template: list, operands: tuple) -> list:
    """The arguments with tensors or addresses where operands stand for them."""
    filled = []
    for argument in template:
        if isinstance(argument, _Operand):
            argument = operands[argument.place]
        elif _is_descriptor(argument):
            argument = _at(argument, operands[argument.base.place])
        filled.append(argument)
    return filled


class _Address:
    """What Triton asks a descriptor's tensor for."""

    def __init__(self, address: int):
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _at(descriptor: Any, operand: Any) -> Any:
    """The same tiles of another tensor or address, without a second check of them."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__)
    moved.base = _Address(operand) if isinstance(operand, int) else operand
    return moved


def _as_published(compiled: Any, grid: tuple[int, int, int], template: list) -> Callable[..., Call]:
    """By a compiled kernel's own interface, which asks for the current stream and encodes descriptors each time."""
    start = compiled[grid]
    return lambda stream, *operands: Call(start, tuple(_filled(template, operands)))


def _beneath_descriptors(compiled: Any, grid: tuple[int, int, int], template: list) -> Callable[..., Call]:
    """By Triton's C function underneath (24 us become 8), with descriptors that are encoded once an address.

    ``CudaLauncher.launch`` is that function, or a closure that encodes descriptors before it calls it. In 3.6 each
    kernel has one of its own; since 3.7 one serves all and is told what a kernel takes, whose arguments come as a list.
    """
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return _as_published(compiled, grid, template)
    encode, metadata, raw = None, (), launcher.launch
    if any(map(_is_descriptor, template)):
        closure = getclosurevars(launcher.launch).nonlocals
        encode, metadata, raw = _encoder(), closure["tensordesc_meta"], closure["launcher"]
    no_scratch, no_hooks = (None, None), (None, None, None)
    flags = launcher.launch_cooperative_grid, launcher.launch_pdl
    one_for_all = hasattr(launcher, "kernel_signature")
    if one_for_all:
        taken = launcher.arg_annotations, launcher.kernel_signature
        options = (*flags, compiled.packed_metadata, *no_hooks, *no_scratch, *taken)
    else:
        options = (*flags, *no_scratch, compiled.packed_metadata, *no_hooks)
    of_descriptor = iter(metadata)
    alike: dict[str, Callable[[int], list]] = {}
    pieces, constants = [], []
    for argument in template:
        if _is_descriptor(argument):
            layout = next(of_descriptor)
            encoded = alike.setdefault(repr((vars(argument), layout)), _encoded(encode, argument, layout))
            pieces.append((constants, argument.base.place, encoded))
            constants = []
        elif isinstance(argument, _Operand):
            pieces.append((constants, argument.place, None))
            constants = []
        else:
            constants.append(argument)

    def prepare(stream: int, *operands: int) -> Call:
        flat = []
        for before, place, encoded in pieces:
            flat += before
            if encoded is None:
                flat.append(operands[place])
            else:
                flat += encoded(operands[place])
        flat += constants
        return Call(raw, (*grid, stream, compiled.function, *options, *((flat,) if one_for_all else flat)))

    return prepare


def _encoder() -> Callable[[Any, Any], list]:
    """Triton's function that makes of a descriptor what a kernel takes; 3.8 and later give it what it does not read."""
    from triton.backends.nvidia import driver

    encode: Any = driver.make_tensordesc_arg
    unread = (None,) * (len(signature(encode).parameters) - 2)
    return lambda descriptor, metadata: encode(descriptor, metadata, *unread)


def _encoded(encode: Any, descriptor: Any, metadata: Any) -> Callable[[int], list]:
    """What a kernel takes for a descriptor, by the address of its tensor.

    A weight's stays where it is, whatever else a launch is given, and encoding takes as long as the launch.
    """
    return lru_cache(REMEMBERED)(lambda address: encode(_at(descriptor, address), metadata))
