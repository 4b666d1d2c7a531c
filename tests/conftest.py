"""Tests marked ``gpu`` are skipped on a machine without one; the planner has small regions rewritten."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from flashsvd_compile.planner import choice

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers have a core each; threads of several would wait for one another


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True, scope="module")
def little_for_the_collector_to_look_at() -> None:
    """What is there before a file's tests is no garbage: a million objects, which took a third of some files' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def small_regions_are_rewritten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small regions on a CPU are rewritten like large ones, which would take long to look at.

    A test of the planner as users have it asks for the fixture :func:`small_regions_stay`.
    """
    if "small_regions_stay" not in request.fixturenames:
        monkeypatch.setattr(choice, "_gains_nothing", lambda *_: False)


@pytest.fixture
def small_regions_stay() -> Iterator[None]:
    """Plans are made anew and forgotten afterwards."""
    plans = choice.plan_attention, choice.plan_mlp, choice.plan_linear
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or bindings of Triton's take what is left at the end for leaks, and say so
