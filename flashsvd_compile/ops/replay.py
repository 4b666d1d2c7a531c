"""An operator's launches, recorded once for each combination of shapes and made again without its Python.

A region takes up to a hundred launches or library calls, and the Python that cuts chunks and describes tiles takes
several times as long as a GPU works, and a twentieth of what a CPU does. All of it depends on shapes, strides, dtypes,
alignment and plain numbers only. So the second call of a combination is recorded: every library operation and every
kernel launch, with each tensor as a view of an argument or of something allocated on the way. Later calls allocate,
look up what launches are given at this call's addresses, and launch (:mod:`.straight_line`). Nothing is kept of the
tensors themselves; unlike a CUDA graph, a recording has neither memory nor addresses of its own.

What a recording cannot hold (an operation whose result's shape depends on values, a tensor from elsewhere, a look at
values) is never replayed; the operator runs as written each time.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.autotune import tuner_at_work
from ..kernels.launch import Launch, listening
from ..kernels.operands import shares_memory
from ..kernels.target import allows_tf32
from .straight_line import Launches, Operation, OtherLayoutError, Produced, Reference, straight_line

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


class Recording(NamedTuple):
    """What one call did. Threads share it.

    Attributes:
        replay: gives the operator's result for other arguments of the same metadata; ``None`` until it is recorded.
            Raises :class:`OtherLayoutError`.
        possible: whether it can be recorded, as far as is known.
    """

    replay: Callable[..., Tensor] | None = None
    possible: bool = True


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
                recordings.pop(list(recordings)[0], None)  # noqa: RUF015, a list is made at once, and threads add to it
            recordings[key] = Recording()
            return implementation(*arguments)
        if not recording.possible:
            return implementation(*arguments)
        if recording.replay is not None:
            try:
                return recording.replay(*arguments)
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


_recorder: ContextVar["_Recorder | None"] = ContextVar("recorder", default=None)


def reads_values() -> None:
    """An implementation calls it where it looks at values past the dispatcher, as ``tolist`` does."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.possible = False


def as_one(function: Callable[..., Tensor], *operands: Any) -> Tensor:
    """``function(*operands)``, which replays call as it is: for what it sets around a library's operation.

    It keeps no tensor, changes none, and returns a fresh one.
    """
    recorder = _recorder.get()
    return function(*operands) if recorder is None else recorder.take_whole(function, operands)


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
    return result, Recording(straight_line(recorder.noted, len(arguments), reference))


def _allocation(fresh: Tensor) -> Operation:
    """As Inductor's code allocates, on the current device and in a third of the time of ``torch.empty_strided``."""
    shape, strides = tuple(fresh.shape), fresh.stride()
    allocate = getattr(guards, f"_empty_strided_{fresh.device.type}", None)
    if allocate is not None:
        return Operation(allocate, (shape, strides, fresh.dtype), produced=_FRESH)
    return Operation(torch.empty_strided, (shape, strides, fresh.dtype, fresh.device), ("dtype", "device"), _FRESH)


_FRESH = (Produced(None, None),)


class _Recorder(TorchDispatchMode):
    """Follows every tensor of a call to what it is a view of, and writes down the operations that are no views."""

    def __init__(self, arguments: tuple):
        super().__init__()
        self.noted: list[Operation | Launches] = []
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
            self.noted.append(Operation(launch.again, tuple(references)))
        elif self.noted and isinstance(self.noted[-1], list):
            self.noted[-1].append((launch, references))
        else:
            self.noted.append([(launch, references)])

    def take_whole(self, function: Callable[..., Tensor], operands: tuple) -> Tensor:
        """A function as one operation, whatever it calls."""
        with _disable_current_modes():
            result = function(*operands)
        self._take(Operation(function, operands), result)
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.possible &= _repeatable(func)
        if func is torch.ops.aten.new_empty.default:
            self._enter(result)
            self.noted.append(_allocation(result))
        else:
            operation = Operation(_QUICK.get(func) or func._op, (*args, *kwargs.values()), tuple(kwargs))
            self._take(operation, result, func._schema.is_mutable)
        return result

    def _take(self, operation: Operation, result: Any, mutates: bool = False) -> None:
        """Note an operation on tensors, unless all that it returns are views."""
        operands = operation.operands
        inputs = [operand for operand in operands if isinstance(operand, Tensor)]
        results = enumerate(result) if isinstance(result, tuple | list) else [(None, result)]
        outputs = [(place, each) for place, each in results if isinstance(each, Tensor)]
        nested = _tensors_in(operands) > len(inputs) or _tensors_in(result) > len(outputs)
        self.possible &= not nested and all(tensor in self._known for tensor in inputs)
        if not self.possible:
            return
        references = tuple(self._known[each] if isinstance(each, Tensor) else each for each in operands)
        fresh = [Produced(place, output.stride()) for place, output in outputs if self._is_fresh(output, inputs)]
        if fresh and len(fresh) < len(outputs):
            self.possible = False
        if fresh or mutates:
            self.noted.append(operation._replace(operands=references, produced=tuple(fresh)))

    def _is_fresh(self, output: Tensor, inputs: list[Tensor]) -> bool:
        """Whether a result is no view of an operand. It is known from now on."""
        if output in self._known:
            return False
        source = next((tensor for tensor in inputs if shares_memory(tensor, output)), None)
        if source is None:
            self._enter(output)
        elif source.dtype != output.dtype:
            self.possible = False  # a reference cannot say it
        else:
            self._known[output] = self._view(output, self._known[source].base)
        return source is None

    def _enter(self, base: Any) -> None:
        """An argument or a fresh result."""
        if isinstance(base, Tensor) and base not in self._known:
            self._known[base] = Reference(len(self._offsets), None, 0)
        self._offsets.append(int(base.storage_offset()) if isinstance(base, Tensor) else 0)

    def _view(self, tensor: Tensor, base: int) -> Reference:
        offset = int(tensor.storage_offset()) - self._offsets[base]
        return Reference(base, (tuple(tensor.shape), tensor.stride(), offset), offset * tensor.element_size())


def _tensors_in(tree: Any) -> int:
    return sum(isinstance(leaf, Tensor) for leaf in tree_leaves(tree))


def _repeatable(func: torch._ops.OpOverload) -> bool:
    """Whether an operation does the same again: no random numbers, no shapes out of values, no look at values."""
    if "scaled_dot_product" in func.name():  # tagged for dropout, which no region has
        return True
    tags = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return tags.isdisjoint(func.tags)
