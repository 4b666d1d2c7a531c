"""What a recorded call did, as one Python function without loops and look-ups.

A replay's own Python took as long as what it calls. So a recording is written down as Inductor writes its wrappers: a
line for each operation, a view before the first line that reads it, ``del`` behind the last.
"""

import re
from collections.abc import Callable, Sequence
from textwrap import indent
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo import guards

from ..kernels.launch import Launch, calls_of, current_stream


class OtherLayoutError(Exception):
    """A library operation returned its result in other strides than when it was recorded.

    Attention does where ``torch.nn.attention.sdpa_kernel`` asks for another implementation.
    """


class Reference(NamedTuple):
    """A view of one of a call's tensors: its arguments, then what its operations return, in their order.

    Attributes:
        base: which.
        layout: shape, strides and offset in elements from the base's first, or ``None`` for the base itself.
        offset_bytes: offset of the first element.
    """

    base: int
    layout: tuple[tuple[int, ...], tuple[int, ...], int] | None
    offset_bytes: int


class Produced(NamedTuple):
    """A fresh tensor that an operation returns.

    Attributes:
        place: which of its results, ``None`` where it is the only one.
        strides: those that were recorded, ``None`` where they cannot be others.
    """

    place: int | None
    strides: tuple[int, ...] | None


class Operation(NamedTuple):
    """A library's operation as it was called.

    Attributes:
        operands: those by position, then those by keyword; references stand for tensors.
        keywords: the names of the latter.
        produced: the fresh tensors among its results.
    """

    function: Callable
    operands: tuple = ()
    keywords: tuple[str, ...] = ()
    produced: tuple[Produced, ...] = ()


Launches = list[tuple[Launch, Sequence[Reference]]]
"""Kernel launches that nothing comes between, each with its tensors."""


def straight_line(noted: Sequence[Operation | Launches], arguments: int, result: Reference) -> Callable[..., Tensor]:
    """A function of a call's arguments that does the same for other tensors of the same metadata.

    It calls no Python function that is not noted. CPython's stack grows by mapped chunks of 16 KiB; where a loop's
    calls cross the end of one, it is mapped, faulted in and unmapped each time, which took 8 % of a BERT on a CPU.

    Args:
        noted: what was done, in this order.
        arguments: how many the call has.
        result: what it returns.

    The function raises :class:`OtherLayoutError`.
    """
    writer = _Writer(arguments)
    for each in noted:
        if isinstance(each, list):
            writer.launch(each)
        else:
            writer.call(each)
    return writer.function(result)


_FRESH = r"\b[rv]\d+\b"
"""Names of fresh memory among those of :class:`_Writer`."""


class _Writer:
    """The lines of a function: ``a0`` is an argument, ``w1`` a view of one, ``r2`` a result, ``v3`` a view of one."""

    def __init__(self, arguments: int):
        self._arguments = [f"a{index}" for index in range(arguments)]
        self._bases = list(self._arguments)
        self._views: dict[Reference, str] = {}
        self._lines: list[str] = []
        self._known: dict[str, Any] = {
            # What Inductor's code calls for a view. It takes half of the time of ``as_strided``.
            "view": guards._reinterpret_tensor,  # pyright: ignore[reportAttributeAccessIssue]: missing in the stubs
            "OtherLayoutError": OtherLayoutError,
        }

    def call(self, operation: Operation) -> None:
        """Call a library's operation and check what it returns."""
        operands = [self._operand(operand) for operand in operation.operands]
        by_position = len(operands) - len(operation.keywords)
        by_keyword = map("{}={}".format, operation.keywords, operands[by_position:])
        call = f"{self._constant(operation.function)}({', '.join([*operands[:by_position], *by_keyword])})"
        of_several = any(each.place is not None for each in operation.produced)
        if of_several or not operation.produced:
            self._lines.append(f"results = {call}" if of_several else call)
        for place, strides in operation.produced:
            fresh = f"r{len(self._bases)}"
            self._bases.append(fresh)
            self._lines.append(f"{fresh} = {call if place is None else f'results[{place}]'}")
            if strides is not None:
                self._lines.append(f"if {fresh}.stride() != {strides}: raise OtherLayoutError")
        if of_several:
            self._lines.append("del results")

    def launch(self, launches: Launches) -> None:
        """Launch kernels one after the other."""
        if "current_stream" not in self._known:
            self._known["current_stream"] = current_stream
            self._lines.append("stream = current_stream()")
        bases = tuple(dict.fromkeys(tensor.base for _, tensors in launches for tensor in tensors))
        at_bases = [(launch, [(bases.index(t.base), t.offset_bytes) for t in tensors]) for launch, tensors in launches]
        addresses = "".join(f", {self._bases[base]}.data_ptr()" for base in bases)
        calls = f"{self._constant(calls_of(at_bases))}(stream{addresses})"
        self._lines.append(f"for start, given in {calls}: start(*given)")

    def function(self, result: Reference) -> Callable[..., Tensor]:
        """All lines, which let go of fresh memory once nothing reads it any more, and the result."""
        body = [f"return {self._operand(result)}"]
        read = set(re.findall(_FRESH, body[0]))
        for line in reversed(self._lines):
            finished = dict.fromkeys(name for name in re.findall(_FRESH, line) if name not in read)
            if finished:
                body.append(f"del {', '.join(finished)}")
            body.append(line)
            read.update(finished)
        lines = indent("\n".join(reversed(body)), "    ")
        exec(compile(f"def replay({', '.join(self._arguments)}):\n{lines}", "<replay>", "exec"), self._known)
        return self._known.pop("replay")  # the function would be known to itself

    def _operand(self, operand: Any) -> str:
        if not isinstance(operand, Reference):
            return self._constant(operand)
        base = self._bases[operand.base]
        if operand.layout is None:
            return base
        if operand not in self._views:
            kind = "w" if operand.base < len(self._arguments) else "v"
            self._views[operand] = view = f"{kind}{len(self._views)}"
            shape, strides, offset = operand.layout
            self._lines.append(f"{view} = view({base}, {shape}, {strides}, {offset})")
        return self._views[operand]

    def _constant(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        name = f"c{len(self._known)}"
        self._known[name] = value
        return name
