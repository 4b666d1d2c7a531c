"""Decoders that fill a cache, as transformers' do unless ``use_cache=False``: their attention is rewritten as well."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import FAMILIES, VOCABULARY
from flashsvd_compile import ops
from tests.ops.accuracy import FACTOR, relative_error

from .compiled import Compiled, factored, in_float64


def two_steps(model: nn.Module, prefill: Callable, ids: Tensor) -> Tensor:
    """What comes of a prompt, and of one more token by the model itself out of the cache that the prompt has filled."""
    prompt = prefill(input_ids=ids[:, :-1], use_cache=True)
    token = model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True)
    return torch.cat([prompt.last_hidden_state, token.last_hidden_state], dim=1)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Qwen3"])
def test_a_prompt_fills_the_cache(name, inner):
    model, wide, ids = factored(name), in_float64(name), torch.randint(3, VOCABULARY, (2, 10))
    compiled = Compiled(model, inner=inner)
    with torch.no_grad():
        exact, unfused, found = (
            two_steps(m, prefill, ids) for m, prefill in ((wide, wide), (model, model), (model, compiled))
        )
    assert compiled.report.count("attention") == FAMILIES[name].attentions, compiled.report
    regions = compiled.graphs[0].find_nodes(op="call_function", target=ops.attention)
    assert all("mask" not in region.kwargs for region in regions)
    allowed = max(FACTOR * relative_error(unfused, exact), 2 * torch.finfo(torch.float32).eps)
    assert relative_error(found, exact) <= allowed
