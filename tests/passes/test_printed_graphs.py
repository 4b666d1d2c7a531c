# ruff: noqa: E501
"""Golden files: how rewritten graphs read. ``EXPECTTEST_ACCEPT=1 pytest`` accepts what has changed."""

import torch
from expecttest import TestCase
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from .builder import rewritten as rewritten_with
from .builder import tensor

X = tensor(2, 6, 32)


def rewritten(function, *inputs):
    """With a fixed budget, so that the planner's workspace does not show."""
    return rewritten_with(function, *inputs, memory_budget=1 << 20)


def low_rank(x, down, up, bias=None):
    return linear(linear(x, down), up, bias)


class PrintedGraphs(TestCase):
    maxDiff = None

    def test_linear(self):
        def function(x, down, up, bias):
            return low_rank(x, down, up, bias)

        code = rewritten(function, X, tensor(4, 32), tensor(24, 4), tensor(24)).code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, down, up, bias):
    linear_2 = torch.ops.flashsvd.linear_v1.default(x = x, w_down = down, w_up = up, w_up_bias = bias, workspace_bytes = 1048576)
    return linear_2""",
        )

    def test_transposed_weights_and_a_diagonal(self):
        def function(x, u, s, v):
            return ((x @ u) * s) @ v

        code = rewritten(function, X, tensor(32, 4), tensor(4), tensor(4, 24)).code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, u, s, v):
    t = u.t()
    unsqueeze = s.unsqueeze(1)
    mul_1 = t.mul(unsqueeze)
    t_1 = v.t()
    linear = torch.ops.flashsvd.linear_v1.default(x = x, w_down = mul_1, w_up = t_1, workspace_bytes = 1048576)
    return linear""",
        )

    def test_product_of_weights(self):
        def function(x, up, down, bias):
            return linear(x, up @ down, bias)

        code = rewritten(function, X, tensor(24, 4), tensor(4, 32), tensor(24)).code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, up, down, bias):
    linear_1 = torch.ops.flashsvd.linear_v1.default(x = x, w_down = down, w_up = up, w_up_bias = bias, workspace_bytes = 1048576)
    return linear_1""",
        )

    def test_mlp(self):
        def function(x, down1, up1, bias1, down2, up2, bias2):
            return low_rank(functional.relu(low_rank(x, down1, up1, bias1)), down2, up2, bias2) + x

        weights = tensor(4, 32), tensor(48, 4), tensor(48), tensor(5, 48), tensor(32, 5), tensor(32)
        self.assertExpectedInline(
            rewritten(function, X, *weights).code,
            """\
def forward(self, x, down1, up1, bias1, down2, up2, bias2):
    mlp = torch.ops.flashsvd.mlp_v3.default(x = x, hidden_down = down1, hidden_up = up1, hidden_up_bias = bias1, out_down = down2, out_up = up2, out_up_bias = bias2, activation = 'relu', workspace_bytes = 1048576)
    add = mlp + x
    return add""",
        )

    def test_residual_of_a_normed_mlp(self):
        def function(x, down1, up1, down2, up2):
            normed = functional.rms_norm(x, (32,))
            return x + functional.dropout(
                low_rank(functional.relu(low_rank(normed, down1, up1)), down2, up2), 0.1, False
            )

        weights = tensor(4, 32), tensor(48, 4), tensor(5, 48), tensor(32, 5)
        self.assertExpectedInline(
            rewritten(function, tensor(3, 6, 32), *weights).code,
            """\
def forward(self, x, down1, up1, down2, up2):
    mlp_1 = torch.ops.flashsvd.mlp_v3.default(x = x, hidden_down = down1, hidden_up = up1, out_down = down2, out_up = up2, residual = x, x_norm = 'rms', x_norm_eps = 1.1920929e-07, activation = 'relu', workspace_bytes = 1048576)
    return mlp_1""",
        )

    def test_packed_gated_mlp(self):
        def function(x, down1, up1, down2, up2):
            packed = low_rank(x, down1, up1).chunk(2, dim=-1)
            return low_rank(functional.silu(packed[0]) * packed[1], down2, up2)

        weights = tensor(4, 32), tensor(96, 4), tensor(5, 48), tensor(32, 5)
        self.assertExpectedInline(
            rewritten(function, X, *weights).code,
            """\
def forward(self, x, down1, up1, down2, up2):
    narrow = up1.narrow(0, 48, 48)
    narrow_1 = up1.narrow(0, 0, 48)
    mlp = torch.ops.flashsvd.mlp_v3.default(x = x, hidden_down = down1, hidden_up = narrow, gate_down = down1, gate_up = narrow_1, out_down = down2, out_up = up2, activation = 'silu', workspace_bytes = 1048576)
    return mlp""",
        )

    def test_attention(self):
        def function(x, mask, q_down, q_up, k_down, k_up, v, out_down, out_up):
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (
                low_rank(x, q_down, q_up), low_rank(x, k_down, k_up), linear(x, v)
            ))  # fmt: skip
            heads = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            return low_rank(heads.transpose(1, 2).flatten(2), out_down, out_up)

        mask = torch.ones(2, 6, dtype=torch.bool)
        weights = (
            tensor(4, 32),
            tensor(32, 4),
            tensor(5, 32),
            tensor(32, 5),
            tensor(32, 32),
            tensor(6, 32),
            tensor(32, 6),
        )
        self.assertExpectedInline(
            rewritten(function, X, mask, *weights).code,
            """\
def forward(self, x, mask, q_down, q_up, k_down, k_up, v, out_down, out_up):
    attention = torch.ops.flashsvd.attention_v5.default(x = x, q_down = q_down, q_up = q_up, k_down = k_down, k_up = k_up, v_up = v, out_down = out_down, out_up = out_up, key_padding = mask, num_heads = 4, num_kv_heads = 4, scale = 0.35355339059327373, workspace_bytes = 1048576)
    return attention""",
        )

    def test_attention_of_factors_of_each_head(self):
        """Those of the same sizes are multiplied out together; the values' rank is another."""

        def function(x, qd, qu, kd, ku, kb, vd, vu):
            def heads_of(down, up):
                return torch.einsum("bhmr,hrd->bhmd", torch.einsum("bmd,hdr->bhmr", x, down), up)

            heads = scaled_dot_product_attention(heads_of(qd, qu), heads_of(kd, ku) + kb, heads_of(vd, vu))
            return heads.transpose(1, 2).flatten(2)

        def factors(rank):
            return tensor(4, 32, rank), tensor(4, rank, 8)

        self.assertExpectedInline(
            rewritten(function, X, *factors(5), *factors(5), tensor(1, 4, 1, 8), *factors(3)).code,
            """\
def forward(self, x, qd, qu, kd, ku, kb, vd, vu):
    cat = torch.cat([qu, ku])
    transpose_1 = cat.transpose(1, 2)
    cat_1 = torch.cat([qd, kd])
    transpose_2 = cat_1.transpose(1, 2)
    matmul = transpose_1.matmul(transpose_2)
    flatten_1 = matmul.flatten(0, 1)
    narrow = flatten_1.narrow(0, 0, 32)
    narrow_1 = flatten_1.narrow(0, 32, 32)
    reshape = kb.reshape((-1,))
    transpose_3 = vu.transpose(1, 2)
    transpose_4 = vd.transpose(1, 2)
    matmul_1 = transpose_3.matmul(transpose_4)
    flatten_2 = matmul_1.flatten(0, 1)
    attention = torch.ops.flashsvd.attention_v5.default(x = x, q_up = narrow, k_up = narrow_1, k_up_bias = reshape, v_up = flatten_2, num_heads = 4, num_kv_heads = 4, scale = 0.35355339059327373, workspace_bytes = 1048576)
    return attention""",
        )

    def test_absorbed_attention_of_factors_of_each_head(self):
        def function(x, q, qb, kd, ku, kb, vd, vu, vb, out):
            k, v = (
                torch.einsum("bhmr,hrd->bhmd", torch.einsum("bmd,hdr->bhmr", x, down), up) + bias
                for down, up, bias in ((kd, ku, kb), (vd, vu, vb))
            )
            heads = scaled_dot_product_attention(linear(x, q, qb).unflatten(-1, (4, 8)).transpose(1, 2), k, v)
            return linear(heads.transpose(1, 2).flatten(2), out)

        factors = tensor(4, 32, 5), tensor(4, 5, 8), tensor(1, 4, 1, 8)
        weights = tensor(32, 32), tensor(32), *factors, *factors, tensor(32, 32)
        code = rewritten_with(function, X, *weights, memory_budget=1 << 20, strategy="absorbed").code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, q, qb, kd, ku, kb, vd, vu, vb, out):
    transpose_2 = ku.transpose(1, 2)
    reshape = kb.reshape((-1,))
    unflatten_1 = reshape.unflatten(0, (4, -1))
    unsqueeze = unflatten_1.unsqueeze(2)
    cat = torch.cat((transpose_2, unsqueeze), 2)
    pad = torch.nn.functional.pad(cat, (0, 2))
    unflatten_2 = q.unflatten(0, (4, -1, 8))
    einsum_4 = torch.functional.einsum('kdr,kgdi->kgri', pad, unflatten_2)
    flatten_1 = einsum_4.flatten(0, 2)
    unflatten_3 = qb.unflatten(0, (4, -1, 8))
    einsum_5 = torch.functional.einsum('kdr,kgd->kgr', pad, unflatten_3)
    flatten_2 = einsum_5.flatten(0, 2)
    transpose_3 = kd.transpose(1, 2)
    pad_1 = torch.nn.functional.pad(transpose_3, (0, 0, 0, 3))
    flatten_3 = pad_1.flatten(0, 1)
    new_zeros = transpose_3.new_zeros((4, 5))
    pad_2 = torch.nn.functional.pad(new_zeros, (0, 1), 'constant', 1.0)
    pad_3 = torch.nn.functional.pad(pad_2, (0, 2))
    flatten_4 = pad_3.flatten()
    transpose_4 = vd.transpose(1, 2)
    pad_4 = torch.nn.functional.pad(transpose_4, (0, 0, 0, 3))
    flatten_5 = pad_4.flatten(0, 1)
    new_zeros_1 = transpose_4.new_zeros((4, 5))
    pad_5 = torch.nn.functional.pad(new_zeros_1, (0, 1), 'constant', 1.0)
    pad_6 = torch.nn.functional.pad(pad_5, (0, 2))
    flatten_6 = pad_6.flatten()
    unflatten_4 = out.unflatten(1, (4, -1, 8))
    transpose_5 = vu.transpose(1, 2)
    reshape_1 = vb.reshape((-1,))
    unflatten_5 = reshape_1.unflatten(0, (4, -1))
    unsqueeze_1 = unflatten_5.unsqueeze(2)
    cat_1 = torch.cat((transpose_5, unsqueeze_1), 2)
    pad_7 = torch.nn.functional.pad(cat_1, (0, 2))
    einsum_6 = torch.functional.einsum('okgd,kdr->okgr', unflatten_4, pad_7)
    flatten_7 = einsum_6.flatten(1)
    attention = torch.ops.flashsvd.attention_v5.default(x = x, q_up = flatten_1, q_up_bias = flatten_2, k_up = flatten_3, k_up_bias = flatten_4, v_up = flatten_5, v_up_bias = flatten_6, out_up = flatten_7, num_heads = 4, num_kv_heads = 4, scale = 0.35355339059327373, strategy = 'absorbed', workspace_bytes = 1048576)
    return attention""",
        )

    def test_absorbed_attention_of_factors_of_all_heads(self):
        def function(x, qd, qu, kd, ku, vd, vu, od, ou):
            parts = low_rank(x, qd, qu), low_rank(x, kd, ku), low_rank(x, vd, vu)
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in parts)
            heads = scaled_dot_product_attention(q, k, v, is_causal=True)
            return low_rank(heads.transpose(1, 2).flatten(2), od, ou)

        weights = [tensor(8, 32), tensor(32, 8)] * 4
        code = rewritten_with(function, X, *weights, memory_budget=1 << 20, strategy="absorbed").code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, qd, qu, kd, ku, vd, vu, od, ou):
    unflatten_3 = ku.unflatten(0, (4, -1))
    unflatten_4 = qu.unflatten(0, (4, -1, 8))
    einsum = torch.functional.einsum('kdr,kgdi->kgri', unflatten_3, unflatten_4)
    flatten_1 = einsum.flatten(0, 2)
    unsqueeze = kd.unsqueeze(0)
    flatten_2 = unsqueeze.flatten(0, 1)
    unsqueeze_1 = vd.unsqueeze(0)
    flatten_3 = unsqueeze_1.flatten(0, 1)
    unflatten_5 = od.unflatten(1, (4, -1, 8))
    unflatten_6 = vu.unflatten(0, (4, -1))
    einsum_1 = torch.functional.einsum('okgd,kdr->okgr', unflatten_5, unflatten_6)
    flatten_4 = einsum_1.flatten(1)
    attention = torch.ops.flashsvd.attention_v5.default(x = x, q_down = qd, q_up = flatten_1, k_up = flatten_2, v_up = flatten_3, out_down = flatten_4, out_up = ou, num_heads = 4, scale = 0.35355339059327373, window_right = 0, strategy = 'absorbed', workspace_bytes = 1048576)
    return attention""",
        )

    def test_attention_with_packed_projections_and_rotation(self):
        def function(x, cos, sin, down, up):
            def rotate(y):
                turned = torch.cat((-y[..., 4:], y[..., :4]), dim=-1)
                return y * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

            packed = low_rank(x, down, up)
            q, k, v = (packed[..., 32 * i : 32 * i + 32].view(2, 6, 4, 8).transpose(1, 2) for i in range(3))
            heads = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            return heads.transpose(1, 2).reshape(2, 6, 32)

        code = rewritten(function, X, tensor(1, 6, 8), tensor(1, 6, 8), tensor(4, 32), tensor(96, 4)).code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, cos, sin, down, up):
    narrow = up.narrow(0, 0, 32)
    narrow_1 = up.narrow(0, 32, 32)
    narrow_2 = up.narrow(0, 64, 32)
    attention = torch.ops.flashsvd.attention_v5.default(x = x, q_down = down, q_up = narrow, k_down = down, k_up = narrow_1, v_down = down, v_up = narrow_2, cos = cos, sin = sin, num_heads = 4, num_kv_heads = 4, scale = 0.35355339059327373, window_right = 0, workspace_bytes = 1048576)
    return attention""",
        )

    def test_refused_region(self):
        def function(x, down, up):
            hidden = linear(x, down)
            return linear(hidden, up), hidden

        self.assertExpectedInline(
            rewritten(function, X, tensor(4, 32), tensor(24, 4)).code,
            """\
def forward(self, x, down, up):
    linear = torch._C._nn.linear(x, down)
    linear_1 = torch._C._nn.linear(linear, up)
    return (linear_1, linear)""",
        )

    def test_attention_with_norms_and_a_soft_cap(self):
        def function(x, down, up, weight, od, ou):
            packed = low_rank(x, down, up).split(32, dim=2)
            parts = (packed[0], packed[1], packed[2])
            q, k, v = (part.view(2, 6, 4, 8).transpose(1, 2) for part in parts)
            q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight) for t in (q, k))
            scores = 50.0 * torch.tanh(q @ k.transpose(2, 3) * 0.25 / 50.0)
            return low_rank((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 32), od, ou)

        weights = (tensor(4, 32), tensor(96, 4), tensor(8), tensor(4, 32), tensor(32, 4))
        code = rewritten(function, X, *weights).code
        self.assertExpectedInline(
            code,
            """\
def forward(self, x, down, up, weight, od, ou):
    add_1 = 1.0 + weight
    add_3 = 1.0 + weight
    narrow = up.narrow(0, 0, 32)
    narrow_1 = up.narrow(0, 32, 32)
    narrow_2 = up.narrow(0, 64, 32)
    attention = torch.ops.flashsvd.attention_v5.default(x = x, q_down = down, q_up = narrow, k_down = down, k_up = narrow_1, v_down = down, v_up = narrow_2, out_down = od, out_up = ou, q_norm = 'rms', q_norm_weight = add_1, q_norm_eps = 1e-06, k_norm = 'rms', k_norm_weight = add_3, k_norm_eps = 1e-06, num_heads = 4, num_kv_heads = 4, scale = 0.25, softcap = 50.0, workspace_bytes = 1048576)
    return attention""",
        )
