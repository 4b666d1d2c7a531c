"""Random regions out of the vocabulary: whatever is rewritten computes the same, and a clean region is rewritten.

Every drawn model is a function of ``x`` and a list of weights; spellings, shapes, ranks, biases, activations, packing,
head layouts and masks vary independently.
"""

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from .builder import rewritten, tensor

examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
sizes = st.integers(1, 4)


class Model:
    """Weights drawn so far; the functions built here read them from the tail of their arguments."""

    def __init__(self, draw: Callable):
        self.draw = draw
        self.weights: list[Tensor] = []

    def weight(self, *shape: int) -> int:
        """The position of a new weight."""
        self.weights.append(tensor(*shape, seed=len(self.weights) + 1))
        return len(self.weights) - 1

    def projection(self, in_features: int, out_features: int) -> Callable:
        """A random spelling of a random projection, as ``f(x, weights)``."""
        limit = min(in_features, out_features)
        kind = self.draw(st.sampled_from(["dense", "linear", "matmul", "transposed", "product", "diagonal", "einsum"]))
        if limit < 2 or kind == "dense":
            w = self.weight(out_features, in_features)
            return self._biased(lambda x, weights: linear(x, weights[w]), out_features)
        rank = self.draw(st.integers(1, limit - 1))
        down, up = self.weight(rank, in_features), self.weight(out_features, rank)
        u, v = self.weight(in_features, rank), self.weight(rank, out_features)
        s = self.weight(rank)
        spellings = {
            "linear": lambda x, w: linear(linear(x, w[down]), w[up]),
            "matmul": lambda x, w: x @ w[u] @ w[v],
            "transposed": lambda x, w: torch.matmul(x.matmul(w[down].t()), w[up].T),
            "product": lambda x, w: linear(x, w[up] @ w[down]),
            "diagonal": lambda x, w: linear(linear(x, w[down]) * w[s], w[up]),
            "einsum": lambda x, w: torch.einsum("bmr,rd->bmd", torch.einsum("bmi,ri->bmr", x, w[down]), w[v]),
        }
        return self._biased(spellings[kind], out_features)

    def _biased(self, project: Callable, features: int) -> Callable:
        b = self.weight(features)
        return {
            "none": project,
            "after": lambda x, w: project(x, w) + w[b],
            "before": lambda x, w: w[b] + project(x, w),
            "in place": lambda x, w: project(x, w).add_(w[b]),
        }[self.draw(st.sampled_from(["none", "after", "before", "in place"]))]

    def run(self, function: Callable, *inputs: Tensor):
        """The rewritten graph of ``function(*inputs, weights)``, checked against the function itself."""
        count = len(inputs)
        arguments = [f"a{i}" for i in range(count + len(self.weights))]
        scope = {"function": function}
        exec(  # a signature of this length, which a tracer can name the inputs by
            f"def flat({', '.join(arguments)}):\n"
            f"    return function({''.join(a + ', ' for a in arguments[:count])}[{', '.join(arguments[count:])}])",
            scope,
        )
        result = rewritten(scope["flat"], *inputs, *self.weights)
        result.assert_same_result()
        return result


ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "hand-written": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "relu": functional.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
    "silu": functional.silu,
    "sigmoid": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def split_in_two(draw: Callable, packed: Tensor, width: int):
    way = draw(st.sampled_from(["chunk", "split", "slices"]))
    parts = {
        "chunk": lambda: packed.chunk(2, dim=-1),
        "split": lambda: packed.split(width, dim=2),
        "slices": lambda: (packed[..., :width], packed[..., width:]),
    }[way]()
    return parts[0], parts[1]


@examples
@given(st.data())
def test_mlps(data):
    model = Model(data.draw)
    batch, length, features, width, out = (data.draw(st.integers(1, 3)) * n for n in (1, 2, 5, 6, 4))
    activation = ACTIVATIONS[data.draw(st.sampled_from(sorted(ACTIVATIONS)))]
    form = data.draw(st.sampled_from(["plain", "gated", "gated, other order", "packed"]))
    hidden = model.projection(features, 2 * width if form == "packed" else width)
    gate = model.projection(features, width)
    last = model.projection(width, out)

    def mlp(x, weights):
        if form == "plain":
            return last(activation(hidden(x, weights)), weights)
        if form == "packed":
            first, second = split_in_two(data.draw, hidden(x, weights), width)
        else:
            first, second = gate(x, weights), hidden(x, weights)
        product = second * activation(first) if form == "gated, other order" else activation(first) * second
        return last(product, weights)

    result = model.run(mlp, tensor(batch, length, features))
    assert result.count("mlp") == any_low_rank(result)


def any_low_rank(result) -> int:
    """One region where any projection of it is low-rank, none in a dense model."""
    return int(bool(result.report.matches))


@examples
@given(st.data())
def test_attentions(data):
    model = Model(data.draw)
    batch, length, kv_heads, group, dim, features = (data.draw(sizes) for _ in range(6))
    heads, features = kv_heads * group, 4 * features
    q, k, v = model.projection(features, heads * dim), *(model.projection(features, kv_heads * dim) for _ in range(2))
    out = model.projection(heads * dim, features)
    repeat = data.draw(st.sampled_from(["expand", "repeat_interleave", "enable_gqa"]))
    causal = data.draw(st.booleans())
    masked = not causal and data.draw(st.booleans())
    mask = torch.rand(batch, 1, 1, length, generator=torch.Generator().manual_seed(length)) > 0.4
    mask[..., :1] = True
    split = data.draw(st.sampled_from(["view", "unflatten", "permute"]))
    spelled_out = not causal and data.draw(st.booleans())

    def apart(y, count):
        if split == "view":
            return y.view(batch, length, count, dim).transpose(1, 2)
        return y.unflatten(-1, (count, dim)).permute(0, 2, 1, 3)

    def repeated(y):
        if repeat == "expand":
            return y[:, :, None].expand(batch, kv_heads, group, length, dim).reshape(batch, heads, length, dim)
        return y.repeat_interleave(group, dim=1)

    def attention(x, mask, weights):
        query, key, value = apart(q(x, weights), heads), apart(k(x, weights), kv_heads), apart(v(x, weights), kv_heads)
        gqa = repeat == "enable_gqa" and not spelled_out
        if not gqa:
            key, value = repeated(key), repeated(value)
        if spelled_out:
            bias = torch.where(mask, 0.0, float("-inf")) if masked else 0.0
            scores = query @ key.transpose(2, 3) * 0.5
            attended = torch.softmax(scores + bias if masked else scores, dim=-1) @ value
        else:
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=mask if masked else None, is_causal=causal, enable_gqa=gqa
            )
        return out(attended.transpose(1, 2).reshape(batch, length, heads * dim), weights)

    result = model.run(attention, tensor(batch, length, features), mask)
    assert result.count("attention") == any_low_rank(result)


@examples
@given(st.data())
def test_chains_of_layers_between_which_anything_may_happen(data):
    """Reads, writes, views and second users in between: some pairs may be rewritten, none may compute wrong."""
    model = Model(data.draw)
    features = 6
    layers = [model.projection(features, features) for _ in range(data.draw(st.integers(1, 4)))]
    steps = [data.draw(st.sampled_from(STEPS)) for _ in layers]

    def chain(x, weights):
        kept = []
        x = x * 1.0
        for layer, step in zip(layers, steps, strict=True):
            before, x = x, layer(x, weights)
            x = step(x, before, kept)
        return x, *kept

    model.run(chain, tensor(2, 3, features))


def _keep(x, before, kept):
    kept.append(x)
    return x


def _write_input(x, before, kept):
    before.mul_(0.5)
    return x


def _write_view(x, before, kept):
    before[0].add_(1.0)
    return x


def _write_result(x, before, kept):
    x.mul_(2.0)
    return x


STEPS = [
    lambda x, before, kept: x,
    lambda x, before, kept: functional.gelu(x),
    lambda x, before, kept: x + before,
    lambda x, before, kept: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x, before, kept: functional.dropout(x, 0.1, training=False),
    lambda x, before, kept: x.view(-1, 6).view(2, 3, 6),
    _keep,
    _write_input,
    _write_view,
    _write_result,
]
