"""The measured models: dense and factored compute the same, and keep the size of their activations."""

import pytest
import torch

from benchmarks import models
from benchmarks.models import Ranks

CPU = torch.device("cpu")
WHOLE = Ranks(attention=6, output=7, mlp=8)
PER_HEAD = Ranks(attention=5, output=7, mlp=8, per_head=True)


def in_float64(build, *arguments, **keywords):
    with models.created_on(CPU, torch.float64):
        return models.frozen(build(*arguments, **keywords))


@pytest.mark.parametrize("ranks", [WHOLE, PER_HEAD], ids=["whole", "per head"])
def test_dense_bert_equals_factored(ranks):
    model = in_float64(models.bert, 2, 32, 64, 2, 16, ranks)
    ids = torch.randint(1000, 2000, (2, 9))
    mask = torch.arange(9).expand(2, 9) < 7
    outputs = [m(input_ids=ids, attention_mask=mask.long()).last_hidden_state for m in (model, models.dense_of(model))]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_dense_llama_equals_factored():
    model = in_float64(models.llama, 2, 32, 48, 2, 16, WHOLE)
    ids = torch.randint(0, 2000, (2, 9))
    outputs = [m(input_ids=ids).last_hidden_state for m in (model, models.dense_of(model))]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)  # transformers' norm rounds to float32


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (models.Mlp, (32, 96, 8)),
        (models.Mlp, (32, 96, 8, True, False)),
        (models.Attention, (32, 2, 8)),
        (models.Attention, (32, 2, 8, True)),
        (models.decoder_without_attention, (2, 32, 96, WHOLE)),
    ],
)
def test_dense_region_equals_factored(build, arguments):
    model = in_float64(build, *arguments)
    dense = models.dense_of(model)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x))
    assert not any(isinstance(module, models.LowRank) for module in dense.modules())


def test_random_factors_keep_the_variance():
    torch.manual_seed(0)
    y = models.LowRank(256, 512, 64)(torch.randn(512, 256))
    assert 0.7 < y.std().item() < 1.4


def test_llama_keeps_its_frequencies_in_float32():
    with models.created_on(CPU, torch.bfloat16):
        model = models.llama(1, 32, 48, 2, 16, WHOLE)
    assert dict(model.named_buffers())["rotary_emb.inv_freq"].dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
