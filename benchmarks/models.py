"""The measured models and regions, with random weights: factored, and dense with the factors multiplied out."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Ranks:
    """Ranks of a transformer's projections.

    Attributes:
        attention: of q, k and v; per head when ``per_head``.
        output: of the attention's output projection.
        mlp: of every projection of the MLP.
        per_head: q, k and v have a pair of factors for each head, applied by einsum.
    """

    attention: int
    output: int
    mlp: int
    per_head: bool = False

    def as_dict(self) -> dict[str, int | bool]:
        return dict(vars(self))


@contextmanager
def created_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create parameters and inputs inside on a device and in a dtype, at once and without a cast.

    Casting a whole model would also round the buffers that transformers keeps in float32, as RoPE's frequencies.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class PerHeadLowRank(nn.Module):
    """``[batch, len, in] -> [batch, len, heads * dim]`` through one rank-``rank`` pair of factors a head."""

    def __init__(self, in_features: int, heads: int, dim: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(heads, in_features, rank) * in_features**-0.5)
        self.up = nn.Parameter(torch.randn(heads, rank, dim) * rank**-0.5)
        self.bias = nn.Parameter(torch.randn(heads, 1, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        latent = torch.einsum("bmd,hdr->bhmr", x, self.down)
        lifted = torch.einsum("bhmr,hrd->bhmd", latent, self.up) + self.bias
        return lifted.transpose(1, 2).flatten(2)

    def merged(self) -> nn.Linear:
        heads, in_features, _ = self.down.shape
        linear = nn.Linear(in_features, heads * self.up.shape[-1], device="meta")
        linear.weight = nn.Parameter((self.down.double() @ self.up.double()).mT.flatten(0, 1).to(self.down.dtype))
        linear.bias = nn.Parameter(self.bias.detach().flatten())
        return linear


class LowRank(nn.Sequential):
    """Two linear layers of random weights that keep the variance of their input; the bias is on the second."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        down = nn.Linear(in_features, rank, bias=False)
        up = nn.Linear(rank, out_features, bias=bias)
        nn.init.normal_(down.weight, std=in_features**-0.5)
        nn.init.normal_(up.weight, std=rank**-0.5)
        if bias:
            nn.init.normal_(up.bias, std=0.02)
        super().__init__(down, up)

    def merged(self) -> nn.Linear:
        down, up = self[0], self[1]
        assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        linear = nn.Linear(down.in_features, up.out_features, bias=up.bias is not None, device="meta")
        linear.weight = nn.Parameter((up.weight.double() @ down.weight.double()).to(up.weight.dtype))
        if up.bias is not None:
            linear.bias = nn.Parameter(up.bias.detach().clone())
        return linear


def dense_of(model: nn.Module) -> nn.Module:
    """A copy with every pair of factors multiplied out to the dense layer that it stands for."""
    dense = copy.deepcopy(model)
    for parent in list(dense.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LowRank, PerHeadLowRank)):
                setattr(parent, name, child.merged())
    return frozen(dense)


M = TypeVar("M", bound=nn.Module)


def frozen(model: M) -> M:
    """The model in evaluation mode, without gradients."""
    return model.requires_grad_(False).eval()


class Mlp(nn.Module):
    """``out(act(hidden(x)))``, or with a gate ``out(silu(gate(x)) * hidden(x))``; ``x[..., features]``."""

    def __init__(self, features: int, width: int, rank: int, gated: bool = False, bias: bool = True):
        super().__init__()
        self.hidden = LowRank(features, width, rank, bias)
        self.gate = LowRank(features, width, rank, bias) if gated else None
        self.out = LowRank(width, features, rank, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.out(functional.gelu(self.hidden(x)))
        return self.out(functional.silu(self.gate(x)) * self.hidden(x))


class Attention(nn.Module):
    """``x[batch, len, features]`` to the concatenated heads, without an output projection."""

    def __init__(self, features: int, heads: int, rank: int, causal: bool = False):
        super().__init__()
        self.q = LowRank(features, features, rank)
        self.k = LowRank(features, features, rank)
        self.v = LowRank(features, features, rank)
        self.heads = heads
        self.causal = causal

    def forward(self, x: Tensor, key_padding: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = None if key_padding is None else key_padding[:, None, None, :]
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return heads.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32 as Llama does."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class DecoderLayerWithoutAttention(nn.Module):
    """All the weights of a Llama layer, read once a token; the sum of q, k and v stands for the attention."""

    def __init__(self, features: int, width: int, ranks: Ranks):
        super().__init__()
        self.q, self.k, self.v = (LowRank(features, features, ranks.attention, bias=False) for _ in range(3))
        self.o = LowRank(features, features, ranks.output, bias=False)
        self.mlp = Mlp(features, width, ranks.mlp, gated=True, bias=False)
        self.attention_norm, self.mlp_norm = RMSNorm(features), RMSNorm(features)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.o(self.q(normed) + self.k(normed) + self.v(normed))
        return x + self.mlp(self.mlp_norm(x))


def decoder_without_attention(layers: int, features: int, width: int, ranks: Ranks) -> nn.Module:
    """``[batch, features] -> [batch, features]`` through a stack of :class:`DecoderLayerWithoutAttention`."""
    return nn.Sequential(*(DecoderLayerWithoutAttention(features, width, ranks) for _ in range(layers)))


class _PerHeadSelfAttention(nn.Module):
    """transformers' BertSelfAttention with per-head factors."""

    def __init__(self, features: int, heads: int, rank: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (PerHeadLowRank(features, heads, features // heads, rank) for _ in range(3))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_args, **_kwargs):
        q, k, v = (
            p(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return heads.transpose(1, 2).flatten(2), None


def bert(layers: int, features: int, width: int, heads: int, positions: int, ranks: Ranks) -> nn.Module:
    """transformers' BertModel (no pooler), every linear layer of its encoder factored."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30522,
        hidden_size=features,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=width,
        max_position_embeddings=positions,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    model: Any = BertModel(config, add_pooling_layer=False)
    for layer in model.encoder.layer:
        attention = layer.attention
        if ranks.per_head:
            attention.self = _PerHeadSelfAttention(features, heads, ranks.attention)
        else:
            for name in ("query", "key", "value"):
                setattr(attention.self, name, LowRank(features, features, ranks.attention))
        attention.output.dense = LowRank(features, features, ranks.output)
        layer.intermediate.dense = LowRank(features, width, ranks.mlp)
        layer.output.dense = LowRank(width, features, ranks.mlp)
    return model


def llama(layers: int, features: int, width: int, heads: int, positions: int, ranks: Ranks) -> nn.Module:
    """transformers' LlamaModel without a cache, every linear layer of its blocks factored."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=features,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=width,
        max_position_embeddings=positions,
        use_cache=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    model: Any = LlamaModel(config)
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, LowRank(features, features, ranks.attention, bias=False))
        attention.o_proj = LowRank(features, features, ranks.output, bias=False)
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, LowRank(features, width, ranks.mlp, bias=False))
        mlp.down_proj = LowRank(width, features, ranks.mlp, bias=False)
    return model
