"""MiniLM, compressed, on real English sentences of unequal length: compiled embeddings equal the unfused model's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashsvd_compile as fsvd
from flashsvd_compile import measure
from flashsvd_compile.cli import minilm

LAYERS = 6
SENTENCES = 12


@pytest.fixture(scope="module")
def model() -> minilm.MiniLM:
    return minilm.load()


@pytest.fixture(scope="module")
def factored(model: minilm.MiniLM) -> nn.Module:
    return minilm.factored(model)


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def batch(model: minilm.MiniLM) -> dict[str, Tensor]:
    batch = model.tokenize(minilm.sentences(SENTENCES))
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() < lengths.max() == batch["input_ids"].shape[1]  # some rows are padded, and none needlessly
    return batch


def test_compiled_embeddings_equal_the_unfused_models(factored: nn.Module, batch: dict[str, Tensor]):
    unfused = minilm.embed(factored, batch)
    compiled: Any = torch.compile(factored, backend="flashsvd")
    fused = minilm.embed(compiled, batch)
    report = fsvd.last_report()
    assert report is not None
    assert (report.count("attention"), report.count("mlp"), report.refusals) == (LAYERS, LAYERS, [])
    assert torch.cosine_similarity(fused, unfused).min() >= 0.9999
    assert measure.relative_error(fused, unfused) < 1e-5


def test_another_batch_and_length_through_the_same_compiled_model(model: minilm.MiniLM, factored: nn.Module):
    compiled: Any = torch.compile(factored, backend="flashsvd", dynamic=True)
    for count, start in ((3, 0), (8, 40), (1, 90)):
        batch = model.tokenize(minilm.sentences(count, start))
        fused = minilm.embed(compiled, batch)
        assert torch.cosine_similarity(fused, minilm.embed(factored, batch)).min() >= 0.9999


def test_less_memory_than_eager(factored: nn.Module, batch: dict[str, Tensor]):
    compiled = torch.compile(factored, backend="flashsvd")

    def peak(model: Any) -> int:
        return measure.peak_activation_bytes(lambda: minilm.embed(model, batch), torch.device("cpu"))

    assert peak(compiled) < 0.6 * peak(factored)


def test_calibrated_compression_keeps_the_embeddings_near_the_dense_ones(
    model: minilm.MiniLM, factored: nn.Module, batch: dict[str, Tensor]
):
    """Plain SVD at the same share of parameters reaches 0.41."""
    assert minilm.mean_cosine(minilm.embed(factored, batch), minilm.embed(model.model, batch)) > 0.8
