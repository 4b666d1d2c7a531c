"""DeepSeek's multi-head latent attention (arXiv:2405.04434): a norm between the factors, a cached latent."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .decoder import HEADS, WIDTH, Decoder, rotate
from .svd_llm import Mlp

NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 8, 4, 8, 12, 10


class Attention(nn.Module):
    """``norms=False`` leaves the factors next to each other."""

    def __init__(self, norms: bool = True):
        super().__init__()
        self.q_a_proj = nn.Linear(WIDTH, Q_RANK, bias=False)
        self.q_b_proj = nn.Linear(Q_RANK, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(WIDTH, KV_RANK + ROPE, bias=False)
        self.kv_b_proj = nn.Linear(KV_RANK, HEADS * (NOPE + VALUE), bias=False)
        self.q_norm = nn.RMSNorm(Q_RANK) if norms else nn.Identity()
        self.kv_norm = nn.RMSNorm(KV_RANK) if norms else nn.Identity()
        self.o_a_proj = nn.Linear(HEADS * VALUE, 9, bias=False)
        self.o_b_proj = nn.Linear(9, WIDTH, bias=False)
        self.cache: Tensor | None = None

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        q = self.q_b_proj(self.q_norm(self.q_a_proj(hidden))).view(batch, length, HEADS, -1).transpose(1, 2)
        q_nope, q_rope = torch.split(q, [NOPE, ROPE], dim=-1)
        latent, k_rope = torch.split(self.kv_a_proj_with_mqa(hidden), [KV_RANK, ROPE], dim=-1)
        self.cache = latent
        kv = self.kv_b_proj(self.kv_norm(latent)).view(batch, length, HEADS, NOPE + VALUE).transpose(1, 2)
        k_nope, v = torch.split(kv, [NOPE, VALUE], dim=-1)
        q_rope, k_rope = rotate(q_rope, k_rope.view(batch, 1, length, ROPE))
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, HEADS, -1, -1)), dim=-1)
        heads = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_b_proj(self.o_a_proj(heads.transpose(1, 2).reshape(batch, length, HEADS * VALUE)))


def build(norms: bool = True) -> nn.Module:
    return Decoder(lambda: Attention(norms), Mlp)
