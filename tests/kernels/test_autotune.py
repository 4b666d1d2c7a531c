"""Tuned tiles: chosen once, found again by others, and never at the cost of a call."""

import gc
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flashsvd_compile.kernels import autotune
from flashsvd_compile.kernels.autotune import Clock, Tuner, about, agree, neighbours, tuned, tuner_of_user, tuning
from flashsvd_compile.kernels.choices import Choices
from flashsvd_compile.kernels.launch import listening
from tests.kernels.clocks import ToldClock

DEVICE = torch.device("cpu")
PROBLEM = {"kernel": "product", "rows": 64, "dtype": "torch.float32"}


class Tile(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int


TABLE, LISTED, NEIGHBOUR = Tile(64, 4, 2), Tile(128, 8, 3), Tile(32, 4, 2)
RESULT = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def run(tile: Tile) -> list[Tensor]:
    return [RESULT.clone()]


def choose(folder: Path, clock: Clock, run: Callable[[Tile], list[Tensor]] = run, **problem: Any) -> Tile:
    return Tuner(folder, clock).tile(PROBLEM | problem, [TABLE, LISTED], run, DEVICE)


@pytest.mark.parametrize("fastest", [TABLE, LISTED, NEIGHBOUR])
def test_the_fastest_tile_is_chosen(tmp_path, fastest):
    assert choose(tmp_path, ToldClock({fastest: 0.5})) == fastest


def test_a_difference_within_noise_leaves_the_choice_to_the_table(tmp_path):
    assert choose(tmp_path, ToldClock({LISTED: 1 - autotune.GAIN / 2})) == TABLE
    assert choose(tmp_path, ToldClock({LISTED: 1 - autotune.GAIN * 2}), rows=32) == LISTED


def test_a_tuner_times_a_problem_once(tmp_path):
    clock = ToldClock({LISTED: 0.5})
    tuner = Tuner(tmp_path, clock)
    tuner.tile(PROBLEM, [TABLE, LISTED], run, DEVICE)
    timed = len(clock.timed)
    assert timed
    assert tuner.tile(PROBLEM, [TABLE, LISTED], run, DEVICE) == LISTED
    assert len(clock.timed) == timed
    tuner.tile(PROBLEM | {"rows": 128}, [TABLE, LISTED], run, DEVICE)
    assert len(clock.timed) == 2 * timed


@pytest.mark.parametrize("chosen", [TABLE, LISTED])
def test_another_process_finds_the_choice_and_does_not_launch(tmp_path, chosen):
    choose(tmp_path, ToldClock({chosen: 0.5}))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["problem"] == PROBLEM
    assert json.loads(file.read_text())["tile"] == chosen._asdict()

    def fail(tile: Tile) -> list[Tensor]:
        raise AssertionError("launched")

    for allowed in (True, False):
        clock = ToldClock({NEIGHBOUR: 0.1}, allowed)
        assert choose(tmp_path, clock, fail) == chosen
        assert not clock.timed


def test_where_nothing_may_be_timed_the_table_decides_until_something_may(tmp_path):
    clock = ToldClock({LISTED: 0.5}, allowed=False)
    tuner = Tuner(tmp_path / "tiles", clock)
    assert tuner.tile(PROBLEM, [TABLE, LISTED], run, DEVICE) == TABLE
    assert not clock.timed
    assert not (tmp_path / "tiles").exists()
    clock.allowed = True
    assert tuner.tile(PROBLEM, [TABLE, LISTED], run, DEVICE) == LISTED


def test_nothing_is_timed_on_a_cpu_nor_while_launches_are_captured_or_recorded(monkeypatch):
    clock, gpu = Clock(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not clock.may_time(DEVICE)
    assert clock.may_time(gpu)
    with listening(lambda launch, tensors: None):
        assert not clock.may_time(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not clock.may_time(gpu)


UNUSABLE = {
    "does not compile": RuntimeError("PassManager::run failed"),
    "too much shared memory": OutOfResources(300_000, 232_448, "shared memory"),
    "no memory": torch.OutOfMemoryError("out of memory"),
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_a_tile_that_cannot_be_launched_is_left_out(tmp_path, why):
    def run_or_fail(tile: Tile) -> list[Tensor]:
        if tile == LISTED:
            raise UNUSABLE[why]
        return run(tile)

    clock = ToldClock({LISTED: 0.1, NEIGHBOUR: 0.5})
    assert choose(tmp_path, clock, run_or_fail) == NEIGHBOUR
    assert str(LISTED) not in clock.timed


def test_a_tile_that_cannot_be_launched_leaves_no_memory(tmp_path):
    """Triton's errors are in cycles with the frames that they were raised in."""
    memory = []

    def run_or_fail(tile: Tile) -> list[Tensor]:
        result = RESULT.clone()
        if tile != TABLE:
            memory.append(ref(result))
            error = RuntimeError("in a cycle by its own frame")
            raise error
        return [result]

    gc.disable()
    try:
        choose(tmp_path, ToldClock({}), run_or_fail)
        assert memory
        assert not any(result() is not None for result in memory)
    finally:
        gc.enable()


def test_a_tile_that_gives_another_result_is_left_out(tmp_path, caplog):
    def run_wrongly(tile: Tile) -> list[Tensor]:
        (result,) = run(tile)
        result[-1] += tile == LISTED
        return [result]

    assert choose(tmp_path, ToldClock({LISTED: 0.1, NEIGHBOUR: 0.5}), run_wrongly) == NEIGHBOUR
    assert "another result" in caplog.text


@pytest.mark.parametrize("results", ["none", "nan"])
def test_without_a_result_to_compare_with_nothing_is_written(tmp_path, caplog, results):
    def run_badly(tile: Tile) -> list[Tensor]:
        if results == "none":
            raise torch.OutOfMemoryError("out of memory")
        return [torch.full_like(RESULT, float("nan"))]

    assert choose(tmp_path, ToldClock({LISTED: 0.1}), run_badly) == TABLE
    assert "not tuned" in caplog.text
    assert not list(tmp_path.iterdir())


def foreign(choice: dict[str, Any]) -> dict[str, str]:
    """What else may be found where a choice should be."""
    return {
        "empty": "",
        "cut off": json.dumps(choice)[:-9],
        "no object": "[1, 2]",
        "no tile": json.dumps({"problem": choice["problem"]}),
        "tile of another version": json.dumps(choice | {"tile": {"block_n": 4096, "num_warps": 4, "num_stages": 2}}),
        "another kind of tile": json.dumps(choice | {"tile": [128, 8, 3]}),
        "another chip": json.dumps(choice | {"problem": {**choice["problem"], "dtype": "torch.float16"}}),
        "not text": "\udcff",
    }


@pytest.mark.parametrize("kind", foreign({"problem": {}}))
def test_a_corrupt_or_foreign_file_is_ignored_and_replaced(tmp_path, caplog, kind):
    choose(tmp_path, ToldClock({LISTED: 0.5}))
    (file,) = tmp_path.iterdir()
    file.write_text(foreign(json.loads(file.read_text()))[kind], errors="surrogateescape")
    assert choose(tmp_path, ToldClock({NEIGHBOUR: 0.5})) == NEIGHBOUR
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert file.name in caplog.text
    assert json.loads(file.read_text())["tile"] == NEIGHBOUR._asdict()


def test_a_folder_that_cannot_be_used_costs_the_choice_only(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert choose(tmp_path / "file" / "tiles", ToldClock({LISTED: 0.5})) == LISTED
    assert "not kept" in caplog.text


def test_many_writers_and_readers_see_whole_choices_only(tmp_path, caplog):
    tiles = [TABLE, LISTED, NEIGHBOUR]

    def work(worker: int) -> set:
        choices, found = Choices(tmp_path), set()
        for turn in range(60):
            choices.write(PROBLEM, tiles[(worker + turn) % 3], 1.0)
            found.add(choices.read(PROBLEM, tiles))
        return found

    with ThreadPoolExecutor(8) as workers:
        assert set().union(*workers.map(work, range(8))) == set(tiles)
    assert not caplog.records
    assert len(list(tmp_path.iterdir())) == 1, "temporary files are gone"


def test_without_a_tuner_the_table_decides():
    assert tuned("product", [TABLE, LISTED], run, RESULT, rows=8) == TABLE


def test_a_tuner_at_work_is_asked_inside_only(tmp_path):
    with tuning(Tuner(tmp_path, ToldClock({LISTED: 0.5}))):
        assert tuned("product", [TABLE, LISTED], run, RESULT, rows=8) == LISTED
        assert tuned("product", [TABLE, LISTED], run, RESULT.half(), rows=8) == LISTED
    assert tuned("product", [TABLE, LISTED], run, RESULT, rows=8) == TABLE
    problems = [json.loads(file.read_text())["problem"] for file in tmp_path.iterdir()]
    assert {problem["dtype"] for problem in problems} == {"torch.float32", "torch.float16"}
    for problem in problems:
        assert problem.keys() >= {"kernel", "chip", "torch", "triton", "kernels", "rows"}


def test_the_folder_is_the_users_cache(tmp_path, monkeypatch):
    def folder() -> Path:
        return tuner_of_user()._choices.folder

    monkeypatch.delenv("FLASHSVD_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "flashsvd_compile" / "tiles"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "flashsvd_compile" / "tiles"
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path / "own"))
    assert folder() == tmp_path / "own" / "tiles"
    assert tuner_of_user() is tuner_of_user()


def test_neighbours_differ_in_one_field_and_stay_within_what_compiles():
    assert set(neighbours(Tile(64, 8, 1))) == {Tile(32, 8, 1), Tile(128, 8, 1), Tile(64, 4, 1), Tile(64, 8, 2)}
    assert set(neighbours(Tile(16, 4, 4))) == {Tile(32, 4, 4), Tile(16, 8, 4), Tile(16, 4, 3)}


def test_batches_of_about_one_size_share_a_choice():
    assert len({about(rows) for rows in (2049, 3000, 4096)}) == 1
    assert about(4097) != about(4096)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_agree_up_to_rounding(dtype):
    exact = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).double()
    exact[0] *= 1000  # a few rows are far larger than the rest
    exact[1] = 0
    result = exact.to(dtype)
    assert agree((result.double() * (1 + torch.finfo(dtype).eps)).to(dtype), result)
    for row in range(len(exact)):
        wrong = result.clone()
        wrong[row, 7] += 1 + wrong[row].abs().amax()
        assert not agree(wrong, result), row
