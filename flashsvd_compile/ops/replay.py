"""An operator's launches, recorded once for each combination of shapes and made again without its Python.

A region takes up to a hundred launches or library calls, and the Python that cuts chunks and describes tiles takes
several times as long as a GPU works, and a twentieth of what a CPU does. All of it depends on shapes, strides, dtypes,
alignment and plain numbers only. So the second call of a combination is recorded: every library operation and every
kernel launch, with each tensor as a view of an argument or of something allocated on the way. Later calls allocate,
look up what launches are given at this call's addresses, and launch. Nothing is kept of the tensors themselves; unlike
a CUDA graph, a recording has neither memory nor addresses of its own.

What a recording cannot hold (an operation whose result's shape depends on values, a tensor from elsewhere, a look at
values) is never replayed; the operator runs as written each time.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.autotune import tuner_at_work
from ..kernels.launch import Launch, in_turn, listening
from ..kernels.operands import shares_memory
from ..kernels.target import allows_tf32

MAX_RECORDINGS = 1024
"""Combinations of shapes that one operator remembers; the oldest goes first."""
ALIGNMENT = 16
"""Bytes. Kernels are compiled for addresses that are multiples of this or not."""

Implementation = Callable[..., Tensor]

_QUICK: dict[torch._ops.OpOverload, Callable] = {
    torch.ops.aten.mm.out: torch.mm,
    torch.ops.aten.addmm.out: torch.addmm,
    torch.ops.aten.addmm_.default: Tensor.addmm_,
    torch.ops.aten.copy_.default: Tensor.copy_,
}
"""Operations by PyTorch's own bindings, which take two thirds of the time of a call by overload. All others are called
by what is beneath an overload, which is Python itself."""


def replayed(implementation: Implementation, neighbours: tuple[int, int] | None = None) -> Implementation:
    """The implementation, recorded at the second call of each combination of arguments and replayed from the third on.

    Args:
        implementation: a function of tensors, numbers, strings and ``None``; it changes none of them, its result is a
            fresh tensor, and what it does depends on its tensors' metadata only.
        neighbours: positions of two arguments of which it may look whether one :func:`lies_behind` the other.
    """
    recordings: dict[tuple, Recording] = {}

    @wraps(implementation)
    def call(*arguments: Any) -> Tensor:
        key = _key(arguments)
        if neighbours is not None:
            key = *key, lies_behind(*(arguments[position] for position in neighbours))
        recording = recordings.get(key)
        if recording is None:
            if len(recordings) >= MAX_RECORDINGS:
                recordings.pop(next(iter(recordings)), None)
            recordings[key] = Recording()
            return implementation(*arguments)
        if not recording.possible:
            return implementation(*arguments)
        if recording.result is not None:
            try:
                return recording.replay(arguments)
            except OtherLayoutError:
                pass
        result, recordings[key] = record(implementation, arguments)
        return result

    return call


def _key(arguments: tuple) -> tuple:
    """All that an implementation may look at, and which arguments are one and the same tensor."""
    seen: dict[int, int] = {}
    first = arguments[0]
    parts: list[Any] = [first.dtype == torch.float32 and allows_tf32(), tuner_at_work(), first.device]
    for argument in arguments:
        if argument is None:  # half of them
            parts.append(None)
        elif isinstance(argument, Tensor):
            which, alignment = seen.setdefault(id(argument), len(seen)), argument.data_ptr() % ALIGNMENT
            parts += which, argument.dtype, argument.shape, argument.stride(), alignment
        else:
            parts.append(argument)
    return tuple(parts)


def lies_behind(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether the memory of a contiguous tensor begins where that of another ends, in one allocation."""
    if first is None or second is None or first.data_ptr() + first.nbytes != second.data_ptr():
        return False
    return first.is_contiguous() and second.is_contiguous() and shares_memory(first, second)


class Reference(NamedTuple):
    """A view of one of a call's tensors: its arguments, then what its operations return, in their order.

    Attributes:
        base: which.
        layout: shape, strides and offset in elements from the base's first, or ``None`` for the base itself.
        offset_bytes: offset of the first element.
    """

    base: int
    layout: tuple[Sequence[int], Sequence[int], int] | None
    offset_bytes: int

    def of(self, tensors: list) -> Tensor:
        """The view in this call's tensors."""
        tensor = tensors[self.base]
        if self.layout is None:
            return tensor
        shape, strides, offset = self.layout
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


class OtherLayoutError(Exception):
    """A library operation returned its result in other strides than when it was recorded.

    Attention does where ``torch.nn.attention.sdpa_kernel`` asks for another implementation.
    """


class Step(NamedTuple):
    """A library operation, or launches of our kernels one after the other.

    Attributes:
        function: the library's, or :func:`in_turn`'s.
        operands: those by position, then those by keyword; tensors are :class:`Reference`.
        keywords: the names of the latter.
        bases: in place of operands, the tensors whose addresses launches take.
        produced: strides of each fresh tensor that an operation returns.
        finished: bases that nothing needs after it.
    """

    function: Callable
    operands: tuple = ()
    keywords: tuple[str, ...] = ()
    bases: tuple[int, ...] = ()
    produced: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recording:
    """What one call did. Threads share it.

    Attributes:
        steps: in their order.
        result: the operator's result; ``None`` until there is a recording.
        possible: whether there can be one, as far as is known.
    """

    steps: Sequence[Step] = ()
    result: Reference | None = None
    possible: bool = True

    def replay(self, arguments: tuple) -> Tensor:
        """The operator's result for other tensors of the same metadata.

        Calls no Python function but launches. CPython's stack grows by mapped chunks of 16 KiB; where a loop's calls
        cross the end of one, it is mapped, faulted in and unmapped each time, which took 8 % of a BERT on a CPU.
        """
        tensors: list[Any] = list(arguments)
        for step in self.steps:
            if step.bases:
                step.function(*[tensors[base].data_ptr() for base in step.bases])
            else:
                operands = []
                for operand in step.operands:
                    if type(operand) is Reference:  # as Reference.of
                        base, layout, _ = operand
                        operand = tensors[base]
                        if layout is not None:
                            shape, strides, offset = layout
                            operand = operand.as_strided(shape, strides, operand.storage_offset() + offset)
                    operands.append(operand)
                positional = len(operands) - len(step.keywords)
                keywords = dict(zip(step.keywords, operands[positional:], strict=True))
                result = step.function(*operands[:positional], **keywords)
                tensor = None
                if step.produced:
                    known = len(tensors)
                    for tensor in result if isinstance(result, tuple | list) else (result,):
                        if isinstance(tensor, Tensor):
                            if tensor.stride() != step.produced[len(tensors) - known]:
                                raise OtherLayoutError
                            tensors.append(tensor)
                operands = operand = keywords = result = tensor = None  # let go of what is finished
            for base in step.finished:
                tensors[base] = None
        assert self.result is not None
        return self.result.of(tensors)


_recorder: ContextVar["_Recorder | None"] = ContextVar("recorder", default=None)


def reads_values() -> None:
    """An implementation calls it where it looks at values past the dispatcher, as ``tolist`` does."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.possible = False


def record(implementation: Implementation, arguments: tuple) -> tuple[Tensor, Recording]:
    """Call the implementation: its result, and the recording, where there can be one."""
    recorder = _Recorder(arguments)
    token = _recorder.set(recorder)
    try:
        with recorder, listening(recorder.take_launch):
            result = implementation(*arguments)
    finally:
        _recorder.reset(token)
    reference = recorder.reference(result) if recorder.possible else None
    if reference is None or reference.base < len(arguments):
        return result, Recording(possible=False)
    steps = [_together(step) if isinstance(step, list) else step for step in recorder.steps]
    return result, Recording(_without_leftovers(steps, reference.base, len(arguments)), reference)


Launched = tuple[Launch, Sequence[Reference]]
"""A launch that takes addresses, and its tensors."""


def _together(launches: list[Launched]) -> Step:
    """One step for launches that nothing comes between."""
    bases = tuple(dict.fromkeys(tensor.base for _, tensors in launches for tensor in tensors))
    at_bases = [(launch, [(bases.index(t.base), t.offset_bytes) for t in tensors]) for launch, tensors in launches]
    return Step(in_turn(at_bases), bases=bases)


def _without_leftovers(steps: list[Step], result: int, count: int) -> list[Step]:
    """The steps, each with the allocations that no later step reads."""
    last: dict[int, int] = {}
    produced = count
    for index, step in enumerate(steps):
        last |= dict.fromkeys(range(produced, produced + len(step.produced)), index)
        produced += len(step.produced)
        read = (operand.base for operand in step.operands if isinstance(operand, Reference))
        last |= dict.fromkeys((*read, *step.bases), index)
    finished: list[list[int]] = [[] for _ in steps]
    for base, index in last.items():
        if base >= count and base != result:
            finished[index].append(base)
    return [step._replace(finished=tuple(bases)) for step, bases in zip(steps, finished, strict=True)]


class _Recorder(TorchDispatchMode):
    """Follows every tensor of a call to what it is a view of, and writes down the operations that are no views."""

    def __init__(self, arguments: tuple):
        super().__init__()
        self.steps: list[Step | list[Launched]] = []
        self.possible = True
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._offsets: list[int] = []  # of each base in its storage, in elements
        for argument in arguments:
            self._enter(argument)

    def reference(self, tensor: Tensor) -> Reference | None:
        """What a tensor is a view of, ``None`` if it comes from elsewhere."""
        return self._known.get(tensor)

    def take_launch(self, launch: Launch, tensors: list[Tensor]) -> None:
        """A launch of one of our kernels."""
        references = [reference for tensor in tensors if (reference := self.reference(tensor)) is not None]
        self.possible &= len(references) == len(tensors)
        if not launch.by_address:
            self.steps.append(Step(launch.again, tuple(references)))
        elif self.steps and isinstance(self.steps[-1], list):
            self.steps[-1].append((launch, references))
        else:
            self.steps.append([(launch, references)])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._take(func, args, kwargs, result)
        return result

    def _take(self, func, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        top_level = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        self.possible &= len(top_level) == len(inputs) and all(t in self._known for t in inputs) and _repeatable(func)
        if not self.possible:
            return
        operands = self._referring((*args, *kwargs.values()))
        fresh = []
        for output in outputs:
            if output in self._known:
                continue
            source = next((t for t in inputs if shares_memory(t, output)), None)
            if source is None:
                fresh.append(output)
            elif source.dtype != output.dtype:
                self.possible = False  # as_strided cannot say it
            else:
                self._known[output] = self._view(output, self._known[source].base)
        if fresh and len(fresh) != len(outputs):
            self.possible = False
        for output in fresh:
            self._enter(output)
        produced = tuple(tensor.stride() for tensor in fresh)
        if func is torch.ops.aten.new_empty.default:
            operands = (tuple(fresh[0].shape), produced[0], fresh[0].dtype, fresh[0].device)
            self.steps.append(Step(torch.empty_strided, operands, ("dtype", "device"), produced=produced))
        elif fresh or func._schema.is_mutable:
            self.steps.append(Step(_QUICK.get(func) or func._op, operands, tuple(kwargs), produced=produced))

    def _referring(self, values: Iterable) -> tuple:
        return tuple(self._known[value] if isinstance(value, Tensor) else value for value in values)

    def _enter(self, base: Any) -> None:
        """An argument or a fresh result."""
        if isinstance(base, Tensor) and base not in self._known:
            self._known[base] = Reference(len(self._offsets), None, 0)
        self._offsets.append(int(base.storage_offset()) if isinstance(base, Tensor) else 0)

    def _view(self, tensor: Tensor, base: int) -> Reference:
        offset = int(tensor.storage_offset()) - self._offsets[base]
        return Reference(base, (tuple(tensor.shape), tensor.stride(), offset), offset * tensor.element_size())


def _repeatable(func: torch._ops.OpOverload) -> bool:
    """Whether an operation does the same again: no random numbers, no shapes out of values, no look at values."""
    if "scaled_dot_product" in func.name():  # tagged for dropout, which no region has
        return True
    tags = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return tags.isdisjoint(func.tags)
