"""Random stacks of transformer blocks: norms, rotation, masks, residuals and what else reads a tensor, in any mixture.

Whatever is rewritten of them computes the same.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from .builder import tensor
from .test_norms import halves
from .test_properties import ACTIVATIONS, Model, examples

INF = float("inf")


def layer_norm(x, weight, bias, size):
    return functional.layer_norm(x, (size,), weight, bias)


def root_mean_square(x, weight, bias, size):
    return functional.rms_norm(x, (size,), weight, 1e-5)


def of_the_weights_shape(x, weight, bias, size):
    return functional.rms_norm(x, weight.shape, weight, 1e-5)


def written_out(x, weight, bias, size):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def deviation(x, weight, bias, size):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * weight + bias


NORMS = {
    "none": lambda x, weight, bias, size: x,
    "layer": layer_norm,
    "rms": root_mean_square,
    "rms of a weight": of_the_weights_shape,
    "own rms": written_out,
    "own layer": deviation,
}


def rotate_pairs(x, cos, sin):
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * cos + turned * sin


ROTATIONS = {"none": lambda x, cos, sin: x, "halves": halves, "pairs": rotate_pairs}


def causal(length, padding):
    return torch.ones(length, length, dtype=torch.bool).tril()


def band(length, padding):
    i = torch.arange(length)
    return (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < 3)


def additive(length, padding):
    return torch.triu(torch.full((length, length), -INF), diagonal=1)


def padded(length, padding):
    return padding[:, None, None, :]


def padded_and_causal(length, padding):
    return causal(length, padding) & padded(length, padding)


def additive_padding(length, padding):
    return (1.0 - padding[:, None, None, :].float()) * torch.finfo(torch.float32).min


MASKS = {
    "none": lambda length, padding: None,
    "causal": causal,
    "band": band,
    "additive": additive,
    "padded": padded,
    "padded and causal": padded_and_causal,
    "additive padding": additive_padding,
}
RESIDUALS = {
    "none": lambda x, y: y,
    "before": lambda x, y: x + y,
    "after": lambda x, y: y + x,
    "in place": lambda x, y: y.add_(x),
    "scaled": lambda x, y: x + 0.5 * y,
    "dropped": lambda x, y: x + functional.dropout(y, 0.1, training=False),
}
READERS = {
    "nobody": lambda kept, x: x,
    "the result": lambda kept, x: kept.append(x) or x,
    "a view": lambda kept, x: kept.append(x[:, :1]) or x,
    "a sum": lambda kept, x: kept.append(x.sum(-1)) or x,
}


class Blocks:
    """A stack of one to three blocks of random parts."""

    def __init__(self, model: Model):
        self.model, self.draw = model, model.draw
        self.batch, self.length = (self.one_of([1, 2, 3]), self.one_of([1, 5, 40, 40]))
        self.kv_heads, group, self.dim = self.one_of([1, 2]), self.one_of([1, 1, 2]), self.one_of([2, 4])
        self.heads = self.kv_heads * group
        self.features = self.one_of([6, self.heads * self.dim])
        mask = self.one_of(sorted(MASKS))
        self.mask, self.is_added = MASKS[mask], mask.startswith("additive")
        self.blocks = [self.block() for _ in range(self.one_of([1, 1, 2, 3]))]

    def one_of(self, choices):
        return self.draw(st.sampled_from(choices))

    def norm(self, wanted=True):
        kind = self.one_of(sorted(NORMS)) if wanted else "none"
        weight, bias = self.model.weight(self.features), self.model.weight(self.features)
        return lambda x, w: NORMS[kind](x, w[weight], w[bias], self.features)

    def attention(self):
        project = self.model.projection
        q, out = project(self.features, self.heads * self.dim), project(self.heads * self.dim, self.features)
        k, v = (project(self.features, self.kv_heads * self.dim) for _ in range(2))
        rotation, reader = ROTATIONS[self.one_of(sorted(ROTATIONS))], READERS[self.one_of(sorted(READERS))]
        spelled_out, fills = self.one_of([False, False, True]), self.one_of([False, True])
        normed, weight = self.one_of([False, False, True]), self.model.weight(self.dim)

        def apart(y, heads):
            return y.view(self.batch, self.length, heads, self.dim).transpose(1, 2)

        def attend(x, mask, cos, sin, kept, w):
            query, key, value = apart(q(x, w), self.heads), apart(k(x, w), self.kv_heads), apart(v(x, w), self.kv_heads)
            if normed:
                query, key = (root_mean_square(each, w[weight], None, self.dim) for each in (query, key))
            query, key = rotation(query, cos, sin), rotation(key, cos, sin)
            value = reader(kept, value)
            key, value = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (key, value))
            if spelled_out:
                scores = query @ key.mT / self.dim**0.5
                if mask is not None and self.is_added:
                    scores = scores + mask
                elif mask is not None and fills:
                    scores = scores.masked_fill(~mask, -INF)
                elif mask is not None:
                    scores = scores + torch.where(mask, 0.0, -INF)
                y = torch.softmax(scores, dim=-1) @ value
            else:
                y = scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return out(y.transpose(1, 2).reshape(self.batch, self.length, -1), w)

        return attend

    def mlp(self):
        width = self.one_of([4, 9])
        hidden, gate = (self.model.projection(self.features, width) for _ in range(2))
        out, activation = self.model.projection(width, self.features), ACTIVATIONS[self.one_of(sorted(ACTIVATIONS))]
        if self.one_of([False, True]):
            return lambda x, w: out(activation(gate(x, w)) * hidden(x, w), w)
        return lambda x, w: out(activation(hidden(x, w)), w)

    def block(self):
        before, behind = ([self.norm(wanted) for _ in range(2)] for wanted in (True, self.one_of([False, False, True])))
        attend, mlp = self.attention(), self.mlp()
        residuals = [RESIDUALS[self.one_of(sorted(RESIDUALS))] for _ in range(2)]
        readers = [READERS[self.one_of(["nobody", *sorted(READERS)])] for _ in range(3)]
        parallel = self.one_of([False, False, True])

        def run(x, mask, cos, sin, kept, w):
            normed = readers[0](kept, before[0](x, w))
            y = behind[0](attend(normed, mask, cos, sin, kept, w), w)
            if parallel:
                return residuals[0](x, y + mlp(normed, w))
            x = readers[1](kept, residuals[0](x, y))
            y = behind[1](mlp(before[1](x, w), w), w)
            return readers[2](kept, residuals[1](x, y))

        return run

    def __call__(self, x, cos, sin, padding, w):
        kept: list[torch.Tensor] = []
        mask = self.mask(self.length, padding)
        for block in self.blocks:
            x = block(x, mask, cos, sin, kept, w)
        return x, *kept


@examples
@given(st.data())
def test_blocks(data):
    model = Model(data.draw)
    blocks = Blocks(model)
    table = tensor(blocks.length, blocks.dim, seed=70)
    padding = torch.ones(blocks.batch, blocks.length, dtype=torch.bool)
    padding[0, 1:] = False
    x = tensor(blocks.batch, blocks.length, blocks.features)
    model.run(blocks, x, table.cos(), table.sin(), padding)
