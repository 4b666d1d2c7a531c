"""Collected only where Triton interprets (see ``../test_interpreter.py``); what a kernel forgets to write is NaN."""

import os

import pytest
import torch
from hypothesis import register_random, settings
from triton import knobs
from triton.runtime import interpreter

from tests.ops.conftest import poisoned_memory, seeded

__all__ = ["poisoned_memory", "seeded"]

# A file that is named on the command line is collected all the same: hence the fixture below.
collect_ignore_glob = [] if knobs.runtime.interpret else ["test_*.py"]

settings.register_profile("interpreter", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.load_profile("interpreter")


class TorchRandom:
    """Lets hypothesis seed torch for each example, so that a failure comes again."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> bytes:
        return torch.get_rng_state().numpy().tobytes()

    def setstate(self, state: bytes) -> None:
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True, scope="session")
def interpreted() -> None:
    if not knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter: set TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def scalars_of_old_tritons(monkeypatch):
    """The interpreter keeps scalars as arrays of one; old ones read them as integers in a way NumPy 2.4 forbids."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
