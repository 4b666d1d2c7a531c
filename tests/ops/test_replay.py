"""Recordings of an operator's launches: they must be what the operator does, for every tensor of the same metadata."""

import ctypes
import sys
from collections.abc import Callable
from inspect import getclosurevars
from random import Random
from threading import Event, Thread
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from flashsvd_compile import ops
from flashsvd_compile.kernels import launch as launching
from flashsvd_compile.kernels.autotune import Tuner, tuner_at_work, tuning
from flashsvd_compile.kernels.launch import Call, is_listened_to
from flashsvd_compile.ops import replay, sdpa, straight_line
from flashsvd_compile.ops.attention import _cpu as attention_cpu
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.replay import MAX_RECORDINGS, Recording, as_one, reads_values, replayed
from tests.ops.regions import attention_arguments, packed, padding


def recordings(call: Callable) -> dict[tuple, Recording]:
    """What a replayed implementation remembers."""
    return getclosurevars(call).nonlocals["recordings"]


def low_rank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, steps: int) -> Tensor:
    """Chunks through one workspace, views of every kind, products into views, an operation in place."""
    out = x.new_empty(*x.shape[:-1], up.shape[0])
    rows_in, rows_out = x.reshape(-1, x.shape[-1]), out.view(-1, up.shape[0])
    memory = x.new_empty(rows_in.shape[0] * down.shape[0] + 8)
    for start in range(0, len(rows_in), steps):
        rows = slice(start, start + steps)
        latent = memory[3 : 3 + len(rows_in[rows]) * down.shape[0]].view(-1, down.shape[0])
        torch.mm(rows_in[rows], down.t(), out=latent)
        torch.mm(latent, up.t(), out=rows_out[rows])
    if bias is not None:
        rows_out += bias
    return out


def arguments(layout: Callable[[Tensor], Tensor] = lambda x: x, bias: bool = True) -> tuple:
    x = layout(torch.randn(2, 10, 6))
    return (x, torch.randn(3, 6), torch.randn(5, 3), torch.randn(5) if bias else None, 7)


LAYOUTS = {
    "contiguous": lambda x: x,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_call_gives_what_the_implementation_gives(layout, bias):
    call = replayed(low_rank)
    for _ in range(4):
        given = arguments(LAYOUTS[layout], bias)
        assert torch.equal(call(*given), low_rank(*given))
    (recording,) = recordings(call).values()
    assert recording.replay is not None, "the third call was replayed"


def test_each_combination_has_a_recording_of_its_own():
    call = replayed(low_rank)
    for given in (arguments(), arguments(bias=False), arguments(LAYOUTS["strided"]), arguments(LAYOUTS["offset"])):
        for _ in range(3):
            assert torch.equal(call(*given), low_rank(*given))
    assert len(recordings(call)) == 4


def test_arguments_that_lie_one_behind_the_other_have_a_recording_of_their_own():
    """What lies in another order, or apart, is another combination."""

    def together(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        adjacent = first.data_ptr() + first.nbytes == second.data_ptr()
        return x @ first.as_strided((10,), (1,)) if adjacent else x.new_zeros(3)

    call, x = replayed(together, neighbours=(1, 2)), torch.randn(3, 10)
    for _ in range(3):
        memory = torch.randn(10)
        first, second = memory.split(5)
        for given in ((first, second), (second, first), (first, torch.randn(5))):
            assert torch.equal(call(x, *given), together(x, *given))
    assert all(recording.replay is not None for recording in recordings(call).values())
    assert len(recordings(call)) == 3


def test_calls_with_the_same_weight_in_other_combinations(monkeypatch):
    """What serves the latest call with a weight serves no other combination."""

    def description(x: Tensor, weight: Tensor, other: Tensor | None, number: float | None) -> tuple:
        tensors = [each for each in (x, weight, other) if each is not None]
        layouts = [(each.dtype, each.shape, each.stride(), each.data_ptr() % 16) for each in tensors]
        rounded = x.dtype == torch.float32 and tf32[0]
        return *layouts, replay.lies_behind(x, other), other is x, x is weight, other is weight, number, rounded

    def implementation(*arguments) -> Tensor:
        return arguments[0].new_full((), codes.setdefault(description(*arguments), len(codes)))

    memory, codes, tf32, weight = torch.zeros(100), {}, [False], torch.zeros(4, 3)
    monkeypatch.setattr(replay, "allows_tf32", lambda: tf32[0])
    x = memory[:12].view(4, 3)
    inputs = [x, x.double(), memory[1:13].view(4, 3), memory[:12].view(3, 4), x.t(), memory[:24:2].view(4, 3), weight]
    others = [None, *inputs, memory[12:24].view(4, 3), memory[13:25].view(4, 3)]
    call, draw = replayed(implementation, weight=1, neighbours=(0, 2)), Random(0)
    for _ in range(3000):
        tf32[0] = draw.random() < 0.1
        given = (draw.choice(inputs), weight, draw.choice(others), draw.choice([None, 1.0, 2]))
        for _ in range(draw.randint(1, 4)):
            assert call(*given) == codes[description(*given)]
    assert len(recordings(call)) == len(codes) > 100


def test_results_share_no_memory_with_earlier_ones():
    call, given = replayed(low_rank), arguments()
    results = [call(*given) for _ in range(4)]
    results[-1].zero_()
    assert torch.equal(results[2], low_rank(*given))


def test_one_tensor_in_two_places_is_another_combination_than_two_tensors():
    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.mm(x, y.t())

    call = replayed(product)
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    for _ in range(3):
        assert torch.equal(call(x, x), product(x, x))
    for _ in range(3):
        assert torch.equal(call(x, y), product(x, y))


def test_two_views_of_one_storage_may_be_two_storages_the_next_time():
    def difference(x: Tensor, y: Tensor) -> Tensor:
        return x[1:] - y[1:]

    call, packed = replayed(difference), torch.randn(8, 3)
    for _ in range(2):
        call(packed[:4], packed[4:])
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(call(x, y), difference(x, y))


class Following(TorchDispatchMode):
    """Which results are alive whenever an operation begins."""

    def __init__(self):
        super().__init__()
        self.alive: list[list[bool]] = []
        self._results: list[ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.alive.append([each() is not None for each in self._results])
        result = func(*args, **kwargs or {})
        self._results += map(ref, result if isinstance(result, tuple) else [result])
        return result


@pytest.mark.parametrize(
    ("implementation", "alive"),
    [
        (lambda x: (x.exp() + 1)[1:].sin().cos(), [[], [1], [0, 0], [0, 0, 1]]),  # of the sum a view is left
        (lambda x: x.sort()[1].double().cos(), [[], [0, 1], [0, 0, 1]]),
    ],
    ids=["of one result", "of two results"],
)
def test_intermediates_are_released_when_nothing_reads_them_any_more(implementation, alive):
    call = replayed(implementation)
    for _ in range(2):
        call(torch.randn(4))
    x = torch.randn(4)
    with Following() as followed:
        result = call(x)
    assert torch.equal(result, implementation(x))
    assert followed.alive == alive


def test_a_replay_calls_no_python_function_for_an_operation():
    """Python's stack may have to grow at any depth, and takes long to each time."""
    call = replayed(lambda x: torch.add((x.exp() + 1)[1:].sin(), 2.0, alpha=3))
    for _ in range(2):
        call(torch.randn(4))
    (recording,) = recordings(call).values()
    assert recording.replay is not None
    x = torch.randn(4)
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        result = recording.replay(x)
    finally:
        sys.setprofile(None)
    assert called == ["replay"]
    assert torch.equal(result, torch.add((x.exp() + 1)[1:].sin(), 2.0, alpha=3))


def test_a_function_that_is_one_operation_is_called_as_it_is():
    """And may set what operations look at, which a replay of the operations alone would not."""
    set_to = []

    def product(x: Tensor, times: float) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            set_to.append(torch.backends.cuda.flash_sdp_enabled())
            return (x * times).t()

    call = replayed(lambda x: as_one(product, x + 1, 3.0).exp())
    for _ in range(4):
        x = torch.randn(3, 2)
        assert torch.equal(call(x), ((x + 1) * 3.0).t().exp())
    assert set_to == [False] * 4
    (recording,) = recordings(call).values()
    assert recording.replay is not None


class AddOne:
    """A kernel's launch as it is on a GPU: it takes the address of a tensor of four."""

    by_address = True

    def __init__(self):
        self.prepared: list[tuple[int, int]] = []

    def prepare(self, stream: int, address: int) -> Call:
        self.prepared.append((stream, address))
        return Call(self.start, (address,))

    def start(self, address: int) -> None:
        numbers = (ctypes.c_float * 4).from_address(address)
        for i in range(4):
            numbers[i] += 1


def add_one(tensor: Tensor, launch: AddOne) -> None:
    launch.start(tensor.data_ptr())
    listener = launching._listener.get()
    if listener is not None:
        listener(launch, [tensor])  # pyright: ignore[reportArgumentType]


@pytest.fixture
def stream(monkeypatch) -> list[int]:
    """The current stream, where there is no GPU to have one."""
    current = [0]
    monkeypatch.setattr(straight_line, "current_stream", lambda: current[0])
    return current


def test_launches_take_addresses_of_this_calls_tensors(stream):
    def implementation(x: Tensor) -> Tensor:
        memory = x.new_empty(20)
        doubled = torch.mul(x, 2, out=memory[3:7])
        add_one(doubled, AddOne())
        out = memory[9:13].copy_(doubled)
        add_one(out, AddOne())
        return out.clone()

    call = replayed(implementation)
    inputs = [torch.randn(4) for _ in range(5)]
    results = [call(x) for x in inputs]
    assert all(recording.replay is not None for recording in recordings(call).values())
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, 2 * x + 1 + 1)


def test_launches_with_nothing_between_them_are_one_step_prepared_once_a_stream_and_place(stream):
    def implementation(x: Tensor) -> Tensor:
        out = x.repeat(3)
        for part in (out[:4], out[8:], out[4:8], out[8:]):
            add_one(part, launch)
        return out

    call, x, launch = replayed(implementation), torch.randn(4), AddOne()
    expected = x.repeat(3) + torch.tensor([1.0, 1, 2]).repeat_interleave(4)
    for _ in range(2):
        call(x)
    assert not launch.prepared
    places, kept = set(), []
    for stream[0] in (3, 3, 4, 4, 4):
        kept.append(call(x))  # so that the next result is elsewhere
        places.add((stream[0], kept[-1].data_ptr()))
        assert torch.equal(kept[-1], expected)
    address = kept[0].data_ptr()
    assert launch.prepared[:4] == [(3, address + offset) for offset in (0, 32, 16, 32)]
    assert len(launch.prepared) == 4 * len(places)


ELSEWHERE = torch.ones(3)
UNRECORDABLE = {
    "looks at values": lambda x: x * float(x.sum()),
    "shape out of values": lambda x: x[x > 0].sum() + x,
    "random numbers": lambda x: x + torch.rand_like(x) * 0,
    "tensor from elsewhere": lambda x: x + ELSEWHERE,
    "returns its argument": lambda x: x.view(-1),
    "another dtype's view": lambda x: x.clone().view(torch.int32).view(torch.float32) + 0,
}


@pytest.mark.parametrize("why", UNRECORDABLE)
def test_what_cannot_be_recorded_runs_as_written_each_time(why):
    implementation = UNRECORDABLE[why]
    call = replayed(implementation)
    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(call(x), implementation(x))
    (recording,) = recordings(call).values()
    assert not recording.possible and recording.replay is None


def test_a_look_past_the_dispatcher_has_to_be_announced():
    def as_many_as(x: Tensor, count: Tensor) -> Tensor:
        reads_values()
        return x[: count.tolist()[0]] + 0

    call, x = replayed(as_many_as), torch.arange(9)
    for count in (3, 3, 3, 5):
        assert len(call(x, torch.tensor([count]))) == count


def test_attention_is_recorded():
    call, given = replayed(attention_cpu), attention_arguments(2, 30, workspace_bytes=1 << 12)
    for _ in range(3):
        torch.testing.assert_close(call(*given), attention_reference(*given))
    assert len(recordings(call)) == 1


def heads_first(x: Tensor) -> Tensor:
    """Of a result whose strides are another implementation's under another ``sdpa_kernel``."""
    with torch._C._AutoDispatchBelowAutograd():  # as an operator runs: a recording sees attention whole
        return scaled_dot_product_attention(x, x, x).transpose(1, 2) + 1


HEADS = torch.randn(2, 5, 3, 8).transpose(1, 2)


def test_a_result_in_other_strides_is_recorded_anew():
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return heads_first(x)

    call = replayed(counted)
    for so_far, backend in enumerate((SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)):
        with sdpa_kernel(backend):
            for _ in range(4):
                torch.testing.assert_close(call(HEADS), heads_first(HEADS))
        assert len(calls) == 2 + so_far


def test_a_thread_replays_what_another_one_records_anew():
    """``sdpa_kernel`` speaks for all threads: here it changes its mind while one of them is in the middle."""
    stopped, go_on = Event(), Event()

    class Stopping(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.add.Tensor:
                stopped.set()
                assert go_on.wait(60)
            return func(*args, **kwargs or {})

    def implementation(x: Tensor) -> Tensor:
        if stopped.is_set():  # recorded anew: the other thread goes on meanwhile
            go_on.set()
            thread.join()
        return heads_first(x)

    def work() -> None:
        with Stopping():
            results.append(call(HEADS))

    call, results = replayed(implementation), []
    with sdpa_kernel(SDPBackend.MATH):
        expected = [call(HEADS) for _ in range(3)][-1]
        thread = Thread(target=work)
        thread.start()
        assert stopped.wait(60)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        results.append(call(HEADS))
    torch.testing.assert_close(results, [expected, expected])


@pytest.mark.parametrize("hidden", ["key_padding", "documents"])
def test_attention_on_a_cpu_looks_at_masks_anew_each_time(hidden, monkeypatch):
    monkeypatch.setattr(sdpa, "WORTH_A_CALL", 0)
    for lengths in ((40, 30), (40, 30), (40, 30), (1, 69), (35, 35)):
        mask = padding(*lengths, total=70) if hidden == "key_padding" else packed(*lengths, batch=2)
        how: dict[str, Any] = {hidden: mask}
        given = attention_arguments(2, 70, workspace_bytes=1 << 12, **how)
        torch.testing.assert_close(ops.attention(*given), attention_reference(*given))


def test_the_oldest_combination_goes_when_there_are_too_many():
    call = replayed(lambda x, n: x + n)
    for n in range(MAX_RECORDINGS + 5):
        call(torch.zeros(1), n)
    assert len(recordings(call)) == MAX_RECORDINGS


def test_tiles_are_tuned_before_launches_are_recorded(tmp_path):
    """And what one tuner chose is not replayed where another one, or the tables, decide."""
    calls = []

    def implementation(x: Tensor) -> Tensor:
        calls.append((tuner_at_work(), is_listened_to()))
        return x + 1

    call, tuner, x = replayed(implementation), Tuner(tmp_path), torch.randn(3)
    for _ in range(3):
        call(x)
    with tuning(tuner):
        for _ in range(3):
            call(x)
    assert calls == [(None, False), (None, True), (tuner, False), (tuner, True)]
    assert len(recordings(call)) == 2
