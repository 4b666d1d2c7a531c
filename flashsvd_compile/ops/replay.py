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

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from operator import itemgetter
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
MAX_OPERATIONS = 8192
"""What a recording holds at most: a longer call runs as written, whose Python is little beside so many operations."""
ALIGNMENT = 16
"""Bytes. Kernels are compiled for addresses that are multiples of this or not."""

TensorGuards: Any = guards.TensorGuards
"""Dynamo's comparison of tensors, whose stub leaves the tensors out."""

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
        replay: gives the operator's result for other arguments of the same combination; ``None`` until it is recorded.
            Raises :class:`OtherLayoutError`.
        serves: whether arguments are of that combination. It takes a third of the time that looking them up does.
        possible: whether it can be recorded, as far as is known.
    """

    replay: Callable[..., Tensor] | None = None
    serves: Callable[[tuple], bool] = lambda arguments: False
    possible: bool = True


def replayed(
    implementation: Implementation, weight: int = 0, neighbours: tuple[int, int] | None = None
) -> Implementation:
    """The implementation, recorded at the second call of each combination of arguments and replayed from the third on.

    Args:
        implementation: a function of tensors, numbers, strings and ``None``; it changes none of them, its result is a
            fresh tensor, and what it does depends on its tensors' metadata only.
        weight: position of a tensor by which a layer's calls are recognised.
        neighbours: positions of two arguments of which it may look whether one :func:`lies_behind` the other.
    """
    recordings: dict[tuple, Recording] = {}
    latest: dict[int, Recording] = {}  # by the weight

    @wraps(implementation)
    def call(*arguments: Any) -> Tensor:
        of_weight = id(arguments[weight])
        recording = latest.get(of_weight)
        if recording is None or not recording.serves(arguments):
            key = _key(arguments, neighbours)
            recording = recordings.get(key)
            if recording is None:
                _put(recordings, key, Recording())
                return implementation(*arguments)
            if not recording.possible:
                return implementation(*arguments)
            _put(latest, of_weight, recording)
        if recording.replay is not None:
            try:
                return recording.replay(*arguments)
            except OtherLayoutError:
                pass
        result, recording = record(implementation, arguments, neighbours)
        recordings[_key(arguments, neighbours)] = latest[of_weight] = recording
        return result

    return call


def _put(remembered: dict[Any, Recording], key: Any, recording: Recording) -> None:
    if len(remembered) >= MAX_RECORDINGS and key not in remembered:
        remembered.pop(list(remembered)[0], None)  # noqa: RUF015, a list is made at once, and other threads add to it
    remembered[key] = recording


class _Combination:
    """All of some arguments that an implementation may look at, and a quick comparison with others'.

    One function of PyTorch looks at all tensors.
    """

    def __init__(self, arguments: tuple, neighbours: tuple[int, int] | None):
        first = {id(each): place for place, each in reversed([*enumerate(arguments)]) if isinstance(each, Tensor)}
        places = sorted(first.values())
        others = [place for place, each in enumerate(arguments) if not isinstance(each, Tensor)]
        again = {*range(len(arguments))}.difference(places, others)
        self._tensors, self._others, self._neighbours = _taking(places), _taking(others), neighbours
        self._again = [(place, first[id(arguments[place])]) for place in again]
        tensors = self._tensors(arguments)
        sizes, strides = ([list(which(each)) for each in tensors] for which in (Tensor.size, Tensor.stride))
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._rest = self._rest_of(arguments, tensors)

    def includes(self, arguments: tuple) -> bool:
        """Whether these arguments are the same but for addresses and contents."""
        tensors = self._tensors(arguments)
        if not self._guards.check(*tensors):  # types, dtypes, devices, shapes and strides, and none is there twice
            return False
        return self._rest_of(arguments, tensors) == self._rest and all(
            arguments[place] is arguments[first] for place, first in self._again
        )

    def _rest_of(self, arguments: tuple, tensors: Sequence[Tensor]) -> tuple:
        alignment = [address % ALIGNMENT for address in map(Tensor.data_ptr, tensors)]
        return *_surroundings(arguments, self._neighbours), alignment, self._others(arguments)


def _taking(places: Sequence[int]) -> Callable[[tuple], Sequence]:
    return itemgetter(*places) if len(places) > 1 else lambda arguments: [arguments[place] for place in places]


def _key(arguments: tuple, neighbours: tuple[int, int] | None) -> tuple:
    """All that an implementation may look at, and which arguments are one and the same tensor."""
    seen: dict[int, int] = {}
    parts: list[Any] = [*_surroundings(arguments, neighbours), arguments[0].device]
    for argument in arguments:
        if argument is None:  # half of them
            parts.append(None)
        elif isinstance(argument, Tensor):
            which, alignment = seen.setdefault(id(argument), len(seen)), argument.data_ptr() % ALIGNMENT
            parts += which, argument.dtype, argument.shape, argument.stride(), alignment
        else:
            parts.append(argument)
    return tuple(parts)


def _surroundings(arguments: tuple, neighbours: tuple[int, int] | None) -> tuple:
    """What an implementation may look at beside its arguments, and where two of them lie."""
    first = arguments[0]
    tf32 = first.dtype == torch.float32 and allows_tf32()
    if neighbours is None:
        return tf32, tuner_at_work()
    first, second = neighbours
    return tf32, tuner_at_work(), lies_behind(arguments[first], arguments[second])


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


def record(
    implementation: Implementation, arguments: tuple, neighbours: tuple[int, int] | None = None
) -> tuple[Tensor, Recording]:
    """Call the implementation: its result, and the recording, where there can be one."""
    recorder = _Recorder(arguments)
    token = _recorder.set(recorder)
    try:
        with recorder, listening(recorder.take_launch):
            result = implementation(*arguments)
    finally:
        _recorder.reset(token)
    possible = recorder.possible and len(recorder.noted) <= MAX_OPERATIONS
    reference = recorder.reference(result) if possible else None
    if reference is None or reference.base < len(arguments):
        return result, Recording(possible=False)
    replay = straight_line(recorder.noted, len(arguments), reference)
    return result, Recording(replay, _Combination(arguments, neighbours).includes)


def _allocation(fresh: Tensor) -> Operation:
    """As Inductor's code allocates, on the current device and in a third of the time of ``torch.empty_strided``."""
    shape, strides, produced = tuple(fresh.shape), fresh.stride(), (Produced(None, None),)
    allocate = getattr(guards, f"_empty_strided_{fresh.device.type}", None)
    if allocate is not None:
        return Operation(allocate, (shape, strides, fresh.dtype), produced=produced)
    return Operation(torch.empty_strided, (shape, strides, fresh.dtype, fresh.device), ("dtype", "device"), produced)


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
