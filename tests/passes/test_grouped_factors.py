"""Factors of single heads or groups of heads, and bases that projections share."""

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile import RefusalReason

from .builder import rewritten, tensor

BATCH, LENGTH, HEADS, DIM, RANK = 2, 6, 4, 8, 3
WIDTH = HEADS * DIM
X = tensor(BATCH, LENGTH, WIDTH)


def heads_of(y):
    return y.view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)


def merge(heads):
    return heads.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def per_head(seed, in_major=True, rank=RANK):
    down = tensor(HEADS, WIDTH, rank, seed=seed)
    up = tensor(HEADS, rank, DIM, seed=seed + 1)
    return (down, up) if in_major else (down.mT.contiguous(), up.mT.contiguous())


PER_HEAD = {
    "einsum": (True, lambda x, u, v: torch.einsum("bhmr,hrd->bhmd", torch.einsum("bmd,hdr->bhmr", x, u), v)),
    "einsum, factors transposed": (
        False,
        lambda x, u, v: torch.einsum("bhmr,hdr->bhmd", torch.einsum("bmd,hrd->bhmr", x, u), v),
    ),
    "matmul": (True, lambda x, u, v: (x.unsqueeze(1) @ u) @ v),
    "matmul of an indexed input": (True, lambda x, u, v: torch.matmul(torch.matmul(x[:, None], u), v)),
}


@pytest.mark.parametrize("rank", [RANK, DIM])
@pytest.mark.parametrize("spelling", PER_HEAD)
def test_factors_of_each_head(spelling, rank):
    in_major, project = PER_HEAD[spelling]

    def function(x, uq, vq, uk, vk, uv, vv, bias, w):
        q, k, v = project(x, uq, vq) + bias, project(x, uk, vk), project(x, uv, vv)
        return linear(merge(scaled_dot_product_attention(q, k, v)), w)

    factors = (weight for seed in (1, 3, 5) for weight in per_head(seed, in_major, rank))
    result = rewritten(function, X, *factors, tensor(1, HEADS, 1, DIM, seed=7), tensor(WIDTH, WIDTH, seed=8))
    assert result.count("attention") == 1, result.report
    assert result.report.matches[0].ranks == {"q": rank, "k": rank, "v": rank, "out": "full"}
    result.assert_same_result()


def test_heads_with_the_rows_in_front():
    def function(x, uq, vq, uk, vk, uv, vv):
        q, k, v = (
            torch.einsum("bmhr,hrd->bmhd", torch.einsum("bmd,hdr->bmhr", x, u), w)
            for u, w in ((uq, vq), (uk, vk), (uv, vv))
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    factors = (weight for seed in (1, 3, 5) for weight in per_head(seed))
    result = rewritten(function, X, *factors)
    assert result.count("attention") == 1, result.report
    result.assert_same_result()


def test_a_rank_space_of_heads_with_another_user_is_refused():
    def function(x, uq, vq, uk, vk, uv, vv):
        project = PER_HEAD["einsum"][1]
        latent = torch.einsum("bmd,hdr->bhmr", x, uq)
        q, k, v = torch.einsum("bhmr,hrd->bhmd", latent, vq), project(x, uk, vk), project(x, uv, vv)
        return merge(scaled_dot_product_attention(q, k, v)), latent

    result = rewritten(function, X, *(weight for seed in (1, 3, 5) for weight in per_head(seed)))
    assert result.report.matches == []
    result.assert_same_result()


def slices(latent, ranks):
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    return [latent[..., start : start + rank] for start, rank in zip(starts, ranks, strict=True)]


def split(latent, ranks):
    parts = latent.split(list(ranks), dim=-1)
    return [parts[i] for i in range(len(ranks))]


@pytest.mark.parametrize("cut", [slices, split])
@pytest.mark.parametrize("ranks", [(2, 3), (5, 6), (12, 12)])
def test_groups_of_features_out_of_ranges_of_the_rank_space(cut, ranks):
    ups = [tensor(WIDTH // 2, rank, seed=10 + i) for i, rank in enumerate(ranks)]

    def function(x, down, up0, up1, d, u):
        parts = cut(linear(x, down), ranks)
        hidden = torch.cat([linear(parts[0], up0), linear(parts[1], up1)], dim=-1)
        return linear(linear(functional.gelu(hidden), d), u)

    result = rewritten(function, X, tensor(sum(ranks), WIDTH, seed=12), *ups, *(tensor(4, WIDTH), tensor(WIDTH, 4)))
    assert result.count("mlp") == 1, result.report
    assert result.report.matches[0].ranks == {"hidden": sum(ranks), "out": 4}
    result.assert_same_result()


def test_groups_of_keys_and_values():
    ranks = (3, 2)

    def function(x, qd, qu, kd, ku0, ku1, vd, vu0, vu1, w):
        k, v = (
            torch.cat([linear(part, up) for part, up in zip(split(linear(x, down), ranks), ups, strict=True)], dim=2)
            for down, ups in ((kd, (ku0, ku1)), (vd, (vu0, vu1)))
        )
        q = linear(linear(x, qd), qu)
        return linear(merge(scaled_dot_product_attention(heads_of(q), heads_of(k), heads_of(v))), w)

    grouped = [tensor(5, WIDTH, seed=20), *(tensor(WIDTH // 2, rank, seed=21) for rank in ranks)]
    weights = tensor(4, WIDTH), tensor(WIDTH, 4), *grouped, *grouped, tensor(WIDTH, WIDTH)
    result = rewritten(function, X, *weights)
    assert result.count("attention") == 1, result.report
    assert result.report.matches[0].ranks == {"q": 4, "k": 5, "v": 5, "out": "full"}
    result.assert_same_result()


def test_groups_in_another_order_are_not_read():
    def function(x, down, up0, up1):
        h = linear(x, down)
        return torch.cat([linear(h[..., 2:], up1), linear(h[..., :2], up0)], dim=-1)

    result = rewritten(function, X, tensor(4, WIDTH), tensor(16, 2), tensor(16, 2, seed=1))
    assert result.report.matches == []
    result.assert_same_result()


def test_groups_that_cost_as_much_as_a_dense_matrix_are_left_alone():
    def function(x, down, up0, up1):
        parts = split(linear(x, down), (12, 12))
        return torch.cat([linear(parts[0], up0), linear(parts[1], up1)], dim=-1)

    result = rewritten(function, X, tensor(24, WIDTH), tensor(16, 12), tensor(16, 12, seed=1))
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.UNPROFITABLE]


def test_a_basis_shared_by_queries_keys_and_values_is_computed_once():
    def function(x, basis, q, k, v, w):
        h = linear(x, basis)
        q, k, v = (heads_of(linear(h, up)) for up in (q, k, v))
        return linear(merge(scaled_dot_product_attention(q, k, v)), w)

    ups = (tensor(WIDTH, 5, seed=i) for i in range(3))
    result = rewritten(function, X, tensor(5, WIDTH), *ups, tensor(WIDTH, WIDTH))
    assert result.count("attention") == 1, result.report
    assert result.report.matches[0].ranks == {"q": 5, "k": 5, "v": 5, "out": "full"}
    assert result.code.count("linear(x, basis)") == 1
    result.assert_same_result()


def test_a_basis_shared_by_gate_and_hidden_projection_is_computed_once():
    def function(x, basis, gate, hidden, d, u):
        h = linear(x, basis)
        return linear(linear(functional.silu(linear(h, gate)) * linear(h, hidden), d), u)

    ups = (tensor(48, 5, seed=i) for i in range(2))
    result = rewritten(function, X, tensor(5, WIDTH), *ups, tensor(4, 48), tensor(WIDTH, 4))
    assert result.count("mlp") == 1, result.report
    assert result.code.count("linear(x, basis)") == 1
    result.assert_same_result()


def test_a_latent_that_a_cache_keeps_stays_and_feeds_the_region():
    def function(x, qd, qu, basis, k, v, w):
        latent = linear(x, basis)
        q, k, v = (heads_of(y) for y in (linear(linear(x, qd), qu), linear(latent, k), linear(latent, v)))
        return linear(merge(scaled_dot_product_attention(q, k, v)), w), latent

    weights = tensor(4, WIDTH), tensor(WIDTH, 4), tensor(5, WIDTH), tensor(WIDTH, 5), tensor(WIDTH, 5, seed=1)
    result = rewritten(function, X, *weights, tensor(WIDTH, WIDTH))
    assert result.count("attention") == 1, result.report
    result.assert_same_result()


def test_a_norm_between_the_factors_is_respected():
    def function(x, down, norm, up):
        return linear(functional.rms_norm(linear(x, down), (5,), norm), up)

    result = rewritten(function, X, tensor(5, WIDTH), tensor(5, seed=1), tensor(WIDTH, 5))
    assert result.report.matches == []
    result.assert_same_result()
