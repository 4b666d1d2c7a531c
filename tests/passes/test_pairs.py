"""A lone low-rank pair is found in every spelling, and computes the same."""

import math
import operator

import pytest
import torch
from torch.nn import functional

from flashsvd_compile import rewrite

from .builder import call, rewritten, tensor

IN, RANK, OUT = 24, 4, 20
X3, X2 = tensor(2, 5, IN), tensor(7, IN)
DOWN, UP = tensor(RANK, IN, seed=1), tensor(OUT, RANK, seed=2)  # nn.Linear's layout
U, V = tensor(IN, RANK, seed=3), tensor(RANK, OUT, seed=4)  # x @ U @ V
BIAS, DOWN_BIAS, DIAGONAL = tensor(OUT, seed=5), tensor(RANK, seed=6), tensor(RANK, seed=7)
linear, aten = functional.linear, torch.ops.aten


def add_after(x, down, up, bias):
    return linear(linear(x, down), up) + bias


def add_in_front(x, down, up, bias):
    return bias + linear(linear(x, down), up)


def augmented_add(x, down, up, bias):
    return call(operator.iadd, linear(linear(x, down), up), bias)


def in_place_add(x, down, up, bias):
    y = linear(linear(x, down), up)
    y.add_(bias)
    return y * 2


def conv1d(x, u, v, down_bias, bias):
    h = torch.addmm(down_bias, x.view(-1, IN), u).view(2, 5, RANK)
    return torch.addmm(bias, h.view(-1, RANK), v).view(2, 5, OUT)


def split_in_the_middle(x, u, v):
    return (x.reshape(-1, IN) @ u).reshape(2, 5, RANK) @ v


SPELLINGS = {
    "linear, linear": (lambda x, down, up: linear(linear(x, down), up), X3, DOWN, UP),
    "linear, linear on a matrix": (lambda x, down, up: linear(linear(x, down), up), X2, DOWN, UP),
    "bias on the second": (lambda x, d, u, b: linear(linear(x, d), u, b), X3, DOWN, UP, BIAS),
    "bias on the first": (lambda x, d, u, b: linear(linear(x, d, b), u), X3, DOWN, UP, DOWN_BIAS),
    "bias on both": (lambda x, d, u, db, b: linear(linear(x, d, db), u, bias=b), X3, DOWN, UP, DOWN_BIAS, BIAS),
    "@": (lambda x, u, v: x @ u @ v, X3, U, V),
    "@ with a bias": (lambda x, u, v, b: x @ u @ v + b, X3, U, V, BIAS),
    "torch.matmul": (lambda x, u, v: torch.matmul(torch.matmul(x, u), v), X3, U, V),
    ".matmul": (lambda x, u, v: x.matmul(u).matmul(v), X3, U, V),
    "torch.mm": (lambda x, u, v: torch.mm(torch.mm(x, u), v), X2, U, V),
    ".mm": (lambda x, u, v: x.mm(u).mm(v), X2, U, V),
    "addmm": (lambda x, u, v, db, b: torch.addmm(b, torch.addmm(db, x, u), v), X2, U, V, DOWN_BIAS, BIAS),
    "addmm by keywords": (
        lambda x, u, v, db, b: torch.addmm(b, mat1=torch.addmm(input=db, mat1=x, mat2=u), mat2=v),
        X2, U, V, DOWN_BIAS, BIAS,
    ),
    "Conv1D": (conv1d, X3, U, V, DOWN_BIAS, BIAS),
    ".t()": (lambda x, down, up: x @ down.t() @ up.t(), X3, DOWN, UP),
    ".T": (lambda x, down, up: x @ down.T @ up.T, X3, DOWN, UP),
    ".mT": (lambda x, down, up: x @ down.mT @ up.mT, X3, DOWN, UP),
    ".T since torch 2.14": (lambda x, down, up: x @ aten.numpy_T(down) @ aten.numpy_T(up), X3, DOWN, UP),
    ".mT since torch 2.14": (lambda x, down, up: x @ aten.mT(down) @ aten.mT(up), X3, DOWN, UP),
    "transpose": (lambda x, d, u: x @ d.transpose(0, 1) @ torch.transpose(u, -1, -2), X3, DOWN, UP),
    "permute": (lambda x, down, up: x @ down.permute(1, 0) @ up.permute(1, 0), X3, DOWN, UP),
    "linear with transposed weights": (lambda x, u, v: linear(linear(x, u.t()), v.t()), X3, U, V),
    "linear, matmul": (lambda x, down, v: linear(x, down) @ v, X3, DOWN, V),
    "einsum": (lambda x, u, v: torch.einsum("blr,rd->bld", torch.einsum("bld,dr->blr", x, u), v), X3, U, V),
    "einsum, transposed": (
        lambda x, d, u: torch.einsum("blr,or->blo", torch.einsum("bli,ri->blr", x, d), u), X3, DOWN, UP,
    ),
    "add after": (add_after, X3, DOWN, UP, BIAS),
    "add in front": (add_in_front, X3, DOWN, UP, BIAS),
    "augmented add": (augmented_add, X3, DOWN, UP, BIAS),
    "in-place add": (in_place_add, X3, DOWN, UP, BIAS),
    "a bias added twice": (lambda x, d, u, b: linear(linear(x, d), u, b) + b, X3, DOWN, UP, BIAS),
    "diagonal": (lambda x, down, s, up: linear(linear(x, down) * s, up), X3, DOWN, DIAGONAL, UP),
    "diagonal in front": (lambda x, down, s, up: linear(s * linear(x, down), up), X3, DOWN, DIAGONAL, UP),
    "diagonal after a bias": (
        lambda x, d, db, s, u, b: linear(linear(x, d, db) * s, u, b), X3, DOWN, DOWN_BIAS, DIAGONAL, UP, BIAS,
    ),
    "a number in between": (lambda x, down, up: linear(linear(x, down) * 0.5, up), X3, DOWN, UP),
    "chunk of a packed factor": (lambda x, p, u: linear(linear(x, p.chunk(2)[1]), u), X3, tensor(2 * RANK, IN), UP),
    "part of a packed factor": (lambda x, p, u: linear(linear(x, p.split(RANK)[0]), u), X3, tensor(2 * RANK, IN), UP),
    "product of the weights": (lambda x, up, down: linear(x, up @ down), X3, UP, DOWN),
    "product of the weights, bias": (lambda x, up, down, b: linear(x, torch.mm(up, down), b), X3, UP, DOWN, BIAS),
    "matmul by a product": (lambda x, u, v: x @ (u @ v), X3, U, V),
    "dropout off": (
        lambda x, d, u: linear(functional.dropout(linear(x, d), 0.1, training=False), u), X3, DOWN, UP,
    ),
    "dropout of nothing": (lambda x, d, u: linear(functional.dropout(linear(x, d), 0.0), u), X3, DOWN, UP),
    "reshaped in between": (split_in_the_middle, X3, U, V),
    "contiguous in between": (lambda x, d, u: linear(linear(x, d).contiguous(), u), X3, DOWN, UP),
    "transposed input": (lambda x, d, u: linear(linear(x.transpose(0, 1), d), u), X3, DOWN, UP),
    "a cast that casts nothing": (lambda x, d, u: linear(linear(x.to(torch.float32), d).float(), u), X3, DOWN, UP),
    "four dimensions": (lambda x, d, u: linear(linear(x, d), u), X3.unflatten(0, (1, 2)), DOWN, UP),
    "a basis of two layers": (lambda x, d, u: linear(linear(x, d), u) + linear(linear(x + 1, d), u), X3, DOWN, UP),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_pair_becomes_one_operator(spelling):
    function, *inputs = SPELLINGS[spelling]
    result = rewritten(function, *inputs)
    assert result.count("linear") == (2 if spelling == "a basis of two layers" else 1), result.report
    assert {match.ranks["w"] for match in result.report.matches} == {RANK}
    result.assert_same_result()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_second_run_changes_nothing(spelling):
    function, *inputs = SPELLINGS[spelling]
    result = rewritten(function, *inputs)
    once = result.code
    assert rewrite(result.module).matches == []
    assert result.code == once


@pytest.mark.parametrize(("rank", "read"), [(OUT - 1, True), (OUT, False)])
def test_a_product_of_weights_below_full_rank(rank, read):
    result = rewritten(lambda x, u, d: linear(x, u @ d), X3, tensor(OUT, rank), tensor(rank, IN))
    assert len(result.report.matches) == read
    result.assert_same_result()


def test_ranks_come_from_the_weights_not_from_what_modules_say():
    result = rewritten(lambda x, d, u: linear(linear(x, d), u), X3, tensor(1, IN), tensor(OUT, 1))
    assert result.report.matches[0].ranks == {"w": 1}
    result.assert_same_result()


def test_a_diagonal_is_folded_inside_the_graph_so_that_reloaded_weights_count():
    result = rewritten(lambda x, d, s, u: linear(linear(x, d) * s, u), X3, DOWN, DIAGONAL, UP)
    reloaded = (X3, tensor(RANK, IN, seed=8), tensor(RANK, seed=9), tensor(OUT, RANK, seed=10))
    torch.testing.assert_close(result.module(*reloaded), result.function(*reloaded))


def test_an_einsum_that_repeats_a_single_feature():
    def function(x, down, up):
        return linear(torch.einsum("bld,rd->blr", x[..., :1], down), up)

    result = rewritten(function, tensor(2, 5, 24), tensor(4, 24), tensor(20, 4))
    assert result.count("linear") == 0
    result.assert_same_result()


@pytest.mark.parametrize("shape", [(1,), (), (1, OUT), (7, OUT)], ids=str)
def test_biases_that_are_broadcast(shape):
    bias = tensor(math.prod(shape)).view(shape)
    result = rewritten(lambda x, down, up, bias: linear(linear(x, down), up, bias), X2, DOWN, UP, bias)
    assert result.count("linear") == 0
    result.assert_same_result()


def test_a_bias_of_one_number_in_addmm():
    result = rewritten(lambda x, u, v, b: torch.addmm(b, x @ u, v), X2, U, V, tensor(1))
    result.assert_same_result()


def test_a_diagonal_beside_float16_factors_is_left_alone():
    """Their product may be too small or too large for float16."""
    inputs = (X2.half() / 1e3, DOWN.half(), UP.half(), torch.full((RANK,), 3e4).half())
    result = rewritten(lambda x, down, up, scale: linear(linear(x, down) * scale, up), *inputs)
    assert result.count("linear") == 0
    assert result.module(*inputs).isfinite().all()


def test_long_chains_of_scales_between_the_factors():
    def function(x, down, up):
        h = linear(x, down)
        for _ in range(400):
            h = h * 1.001
        return linear(h, up)

    result = rewritten(function, X2, DOWN, UP)
    result.assert_same_result()
