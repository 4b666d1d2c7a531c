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
from torch._C._dynamo import guards
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


_view = guards._reinterpret_tensor  # pyright: ignore[reportAttributeAccessIssue]: missing in the stubs
"""Of a tensor, by shape, strides and offset from its first element: what Inductor's code calls for the same. It takes
half of the time of ``as_strided``."""


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

    def of(self, values: list) -> Tensor:
        """The view in this call's tensors."""
        tensor = values[self.base]
        if self.layout is None:
            return tensor
        return _view(tensor, *self.layout)


class OtherLayoutError(Exception):
    """A library operation returned its result in other strides than when it was recorded.

    Attention does where ``torch.nn.attention.sdpa_kernel`` asks for another implementation.
    """


class Step(NamedTuple):
    """A library operation, or launches of our kernels one after the other, on the values of a call by their slots.

    Attributes:
        function: the library's, or :func:`in_turn`'s, which takes addresses.
        operands: slots of the operands by position, then of those by keyword.
        keywords: the names of the latter.
        launches: whether it is launches.
        views: views that it is the first to read: slot, the slot of what they are views of, and layout.
        produced: strides of each fresh tensor that it returns.
        first: the slot of the first of these; those of the others follow.
        finished: slots that nothing needs after it.
    """

    function: Callable
    operands: tuple[int, ...]
    keywords: tuple[str, ...] = ()
    launches: bool = False
    views: tuple[tuple[int, int, Sequence[int], Sequence[int], int], ...] = ()
    produced: tuple[tuple[int, ...], ...] = ()
    first: int = 0
    finished: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recording:
    """What one call did. Threads share it.

    A call's values are its arguments, then what operations return, then what is known beforehand, and views: those of
    weights and of workspaces serve every chunk.

    Attributes:
        steps: in their order.
        values: those behind the arguments, as a call begins.
        result: the operator's result; ``None`` until there is a recording.
        possible: whether there can be one, as far as is known.
    """

    steps: Sequence[Step] = ()
    values: Sequence[Any] = ()
    result: Reference | None = None
    possible: bool = True

    def replay(self, arguments: tuple) -> Tensor:
        """The operator's result for other tensors of the same metadata.

        Calls no Python function but launches. CPython's stack grows by mapped chunks of 16 KiB; where a loop's calls
        cross the end of one, it is mapped, faulted in and unmapped each time, which took 8 % of a BERT on a CPU.
        """
        values: list[Any] = [*arguments, *self.values]
        take = values.__getitem__
        for step in self.steps:
            for slot, base, shape, strides, offset in step.views:
                values[slot] = _view(values[base], shape, strides, offset)
            if step.launches:
                step.function(*map(Tensor.data_ptr, map(take, step.operands)))
            elif step.keywords:
                operands, positional = [*map(take, step.operands)], -len(step.keywords)
                keywords = dict(zip(step.keywords, operands[positional:], strict=True))
                result = step.function(*operands[:positional], **keywords)
            else:
                result = step.function(*map(take, step.operands))
            if step.produced:
                slot = step.first
                for tensor in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(tensor, Tensor):
                        if tensor.stride() != step.produced[slot - step.first]:
                            raise OtherLayoutError
                        values[slot] = tensor
                        slot += 1
            if step.finished:
                operands = keywords = result = tensor = None  # let go of what is finished
                for slot in step.finished:
                    values[slot] = None
        assert self.result is not None
        return self.result.of(values)


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
    return result, _arranged(recorder.noted, len(arguments), reference)


class _Operation(NamedTuple):
    """A library's operation as it was called.

    Attributes:
        operands: those by position, then those by keyword; tensors are references.
        produced: strides of each fresh tensor that it returns.
    """

    function: Callable
    operands: tuple = ()
    keywords: tuple[str, ...] = ()
    produced: tuple[tuple[int, ...], ...] = ()


def _allocation(fresh: Tensor) -> _Operation:
    """As Inductor's code allocates, on the current device and in a third of the time of ``torch.empty_strided``."""
    shape, strides = tuple(fresh.shape), fresh.stride()
    allocate = getattr(guards, f"_empty_strided_{fresh.device.type}", None)
    if allocate is not None:
        return _Operation(allocate, (shape, strides, fresh.dtype), produced=(strides,))
    operands = (shape, strides, fresh.dtype, fresh.device)
    return _Operation(torch.empty_strided, operands, ("dtype", "device"), (strides,))


_Launches = list[tuple[Launch, Sequence[Reference]]]
"""Launches that nothing comes between, each with its tensors."""


def _arranged(noted: Sequence[_Operation | _Launches], arguments: int, result: Reference) -> Recording:
    """A recording of what was noted of a call with so many arguments."""
    produced = arguments + sum(len(each.produced) for each in noted if isinstance(each, _Operation))
    beforehand: list[Any] = []
    slots: dict[Reference, int] = {}
    steps: list[Step] = []
    first = arguments

    def new_slot(value: Any = None) -> int:
        beforehand.append(value)
        return produced + len(beforehand) - 1

    for each in noted:
        if isinstance(each, list):
            steps.append(_together(each))
            continue
        operands, views = [], []
        for operand in each.operands:
            if not isinstance(operand, Reference):
                operands.append(new_slot(operand))
            elif operand.layout is None:
                operands.append(operand.base)
            else:
                if operand not in slots:
                    slots[operand] = new_slot()
                    views.append((slots[operand], operand.base, *operand.layout))
                operands.append(slots[operand])
        steps.append(Step(each.function, tuple(operands), each.keywords, False, tuple(views), each.produced, first))
        first += len(each.produced)
    fresh = {*range(arguments, produced)} - {result.base}
    fresh |= {slot for reference, slot in slots.items() if reference.base in fresh}
    values = [None] * (produced - arguments) + beforehand
    return Recording(_letting_go(steps, fresh), values, result)


def _together(launches: _Launches) -> Step:
    """One step for launches that nothing comes between."""
    bases = tuple(dict.fromkeys(tensor.base for _, tensors in launches for tensor in tensors))
    at_bases = [(launch, [(bases.index(t.base), t.offset_bytes) for t in tensors]) for launch, tensors in launches]
    return Step(in_turn(at_bases), bases, launches=True)


def _letting_go(steps: list[Step], fresh: set[int]) -> list[Step]:
    """The steps, each with the slots of fresh memory that no later step reads."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        made = (slot for view in step.views for slot in view[:2])
        last |= dict.fromkeys((*step.operands, *made, *range(step.first, step.first + len(step.produced))), index)
    finished: list[list[int]] = [[] for _ in steps]
    for slot in sorted(fresh & last.keys()):
        finished[last[slot]].append(slot)
    return [step._replace(finished=tuple(slots)) for step, slots in zip(steps, finished, strict=True)]


class _Recorder(TorchDispatchMode):
    """Follows every tensor of a call to what it is a view of, and writes down the operations that are no views."""

    def __init__(self, arguments: tuple):
        super().__init__()
        self.noted: list[_Operation | _Launches] = []
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
            self.noted.append(_Operation(launch.again, tuple(references)))
        elif self.noted and isinstance(self.noted[-1], list):
            self.noted[-1].append((launch, references))
        else:
            self.noted.append([(launch, references)])

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
            self.noted.append(_allocation(fresh[0]))
        elif fresh or func._schema.is_mutable:
            self.noted.append(_Operation(_QUICK.get(func) or func._op, operands, tuple(kwargs), produced))

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
