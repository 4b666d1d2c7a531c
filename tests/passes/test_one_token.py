"""A token of transformers' Llama that reads a cache: what decoding on a GPU makes of a layer."""

from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.models import frozen
from flashsvd_compile import compress, ops
from flashsvd_compile.passes import few_rows, input_norm, region, rewrite

LAYERS = 2
PROMPT = torch.arange(7)[None]
TOKEN, POSITION = torch.tensor([[3]]), torch.tensor([[7]])


def llama() -> LlamaForCausalLM:
    """Every projection of its layers factored."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=32,
    )
    return frozen(compress(LlamaForCausalLM(config), keep_ratio=0.5, targets=["model.layers.*"]))


def test_a_layer_is_three_operators_around_its_attention(monkeypatch):
    """Queries, keys and values of the normed stream; the output projection, added to it; the MLP of its norm, added."""
    monkeypatch.setattr(region, "_name_of", lambda device: "NVIDIA H200")
    for rules in (few_rows, input_norm):
        monkeypatch.setattr(rules, "is_on_gpu", lambda node: True)
    torch.manual_seed(0)
    model, calls = llama(), Counter()

    def backend(graph_module, example_inputs):
        rewrite(graph_module)
        for node in graph_module.graph.nodes:
            if node.target in (ops.packed_linear, ops.linear, ops.mlp):
                calls[node.target, node.kwargs.get("x_norm"), "residual" in node.kwargs] += 1
        return graph_module.forward

    def logits(call) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(PROMPT, past_key_values=cache, use_cache=True)
        return call(TOKEN, past_key_values=cache, use_cache=True, position_ids=POSITION).logits

    compiled = torch.compile(model, backend=backend, dynamic=False)
    torch.testing.assert_close(logits(compiled), logits(model))
    assert calls == {
        (ops.packed_linear, "rms", False): LAYERS,
        (ops.packed_linear, None, True): LAYERS,
        (ops.mlp, "rms", True): LAYERS,
    }
