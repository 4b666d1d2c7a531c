"""A pre-norm model holds its stream, its normed stream, one result and a workspace, however many layers it has."""

import pytest
import torch

from benchmarks.models import Ranks, llama
from flashsvd_compile.measure import peak_activation_bytes

LENGTH, FEATURES, HEADS = 1024, 256, 4
BUDGET = 1 << 20
STREAM = 4 * LENGTH * FEATURES
TABLES = 2 * STREAM // HEADS
KERNEL_SCRATCH = 3 << 18
"""As in the memory tests of the operators: what PyTorch's attention kernel allocates for a thread."""


@pytest.fixture(autouse=True)
def one_thread():
    """The kernel's scratch grows with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Overrides the fixture of the other tests: poisoning allocates."""


def peak(layers: int, **options) -> int:
    """Peak activation bytes of a forward pass through Inductor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = llama(layers, FEATURES, 640, HEADS, LENGTH, Ranks(attention=32, output=32, mlp=48)).eval()
    compiled = torch.compile(model, backend="flashsvd", options={"memory_budget": BUDGET, **options})
    tokens = torch.randint(0, 32000, (1, LENGTH))
    with torch.no_grad():
        actual, expected = compiled(input_ids=tokens)[0], model(input_ids=tokens)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        del actual, expected
        return peak_activation_bytes(lambda: compiled(input_ids=tokens), torch.device("cpu"))


def test_the_stream_is_one_tensor_and_its_peak_is_that_of_one_layer():
    found = peak(4)
    small = STREAM // 64  # means of squares, token numbers
    assert found <= 3 * STREAM + TABLES + BUDGET + KERNEL_SCRATCH + small
    assert found == peak(2)
    assert found <= peak(4, disable=["residual"]) - STREAM // 4
