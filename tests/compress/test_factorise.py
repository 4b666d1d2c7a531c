"""Which layers ``compress`` factors, to which rank, and what it refuses."""

import copy
import math
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune, weight_norm
from transformers import FalconConfig, FalconModel, GPT2Config, GPT2LMHeadModel
from transformers.models.falcon.modeling_falcon import FalconLinear

from flashsvd_compile.compress import LowRankLinear, compress
from flashsvd_compile.errors import CompressionError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(48, 48)
        self.up = nn.Linear(48, 96, bias=False)
        self.down = nn.Linear(96, 48)
        self.classifier = nn.Linear(48, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x + self.down(self.up(self.query(x)).relu()))


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.mark.parametrize("keep_ratio", [0.001, 0.3, 0.5, 0.99])
def test_rank_keeps_the_share_of_parameters(block: Block, keep_ratio: float):
    small = compress(block, keep_ratio)
    assert ranks_of(small) == {
        "query": max(1, math.floor(keep_ratio * 48 * 48 / 96)),
        "up": max(1, math.floor(keep_ratio * 48 * 96 / 144)),
        "down": max(1, math.floor(keep_ratio * 48 * 96 / 144)),
    }


def test_the_model_given_stays_as_it_was(block: Block):
    before = copy.deepcopy(block.state_dict())
    small = compress(block)
    assert ranks_of(block) == {}
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert small.classifier.weight is not block.classifier.weight


def test_output_is_near_the_dense_output_at_high_rank(block: Block):
    x = torch.randn(5, 48)
    nearly_full = compress(block, 0.99, ranks={"query": 23})
    bias_only = compress(block, 0.02)
    dense = block(x)
    assert torch.linalg.norm(nearly_full(x) - dense) < torch.linalg.norm(bias_only(x) - dense)


def test_low_rank_weight_is_reproduced(block: Block):
    """A weight that has the rank already loses nothing."""
    with torch.no_grad():
        block.up.weight.copy_(torch.randn(96, 4) @ torch.randn(4, 48))
    small = compress(block, ranks={"up": 4}, targets=["up"])
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(small(x), block(x))


def test_ranks_by_pattern_first_fit_counts(block: Block):
    small = compress(block, 0.5, ranks={"up": 7, "u*": 8, "query": 3})
    assert ranks_of(small) == {"query": 3, "up": 7, "down": 16}


def test_a_rank_may_be_an_integer_of_numpy(block: Block):
    assert ranks_of(compress(block, ranks={"query": np.int64(3)}))["query"] == 3  # pyright: ignore


def test_compiled_model_is_compressed_as_the_model_itself(block: Block):
    small = compress(torch.compile(block), ranks={"up": 3})  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert type(small) is Block
    assert small.state_dict().keys() == compress(block).state_dict().keys()


def test_targets_and_skip(block: Block):
    assert set(ranks_of(compress(block, targets=["up", "down"]))) == {"up", "down"}
    assert set(ranks_of(compress(block, skip=["up"]))) == {"query", "down", "classifier"}


def test_a_plain_string_is_one_pattern(block: Block):
    assert set(ranks_of(compress(block, targets="up"))) == {"up"}
    assert set(ranks_of(compress(block, skip="up"))) == {"query", "down", "classifier"}


def test_patterns_may_come_from_a_generator(block: Block):
    small = compress(block, targets=(pattern for pattern in ["*"]), skip=(name for name in ["up", "classifier"]))
    assert set(ranks_of(small)) == {"query", "down"}


def test_factors_are_not_factored_again(block: Block):
    once = compress(block, targets=["up"])
    twice = compress(once, 0.3)
    assert set(ranks_of(twice)) == {"query", "up", "down"}
    assert torch.equal(twice.up.weight, once.up.weight)
    with pytest.raises(CompressionError, match=r"skip leaves out classifier; 3 are low-rank already"):
        compress(twice)


def test_layer_that_would_not_shrink_stays_dense(block: Block):
    small = compress(block, ranks={"query": 24, "up": 31})
    assert ranks_of(small) == {"up": 31, "down": 16}
    assert type(small.query) is nn.Linear


def test_dtype_bias_mode_and_trainability_are_kept(block: Block):
    block.eval().to(torch.bfloat16)
    block.query.requires_grad_(False)
    small = compress(block)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.up.bias is None
    assert not any(module.training for module in small.modules())
    assert not any(p.requires_grad for p in small.query.parameters())
    assert all(p.requires_grad for p in small.down.parameters())


def test_bias_that_trains_alone_still_does(block: Block):
    block.query.weight.requires_grad_(False)
    small = compress(block)
    assert [name for name, p in small.query.named_parameters() if p.requires_grad] == ["up.bias"]


def test_shared_bias_stays_shared():
    bias = nn.Parameter(torch.randn(16))
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    for module in model.children():
        module.bias = bias
    small = compress(model, skip=["1"])
    assert set(ranks_of(small)) == {"0", "2"}
    assert all(module.bias is small[0].bias for module in small.children())
    assert small[0].bias is not bias
    assert torch.equal(small[0].get_parameter("up.bias"), bias)


def test_gpt2_conv1d_and_tied_head():
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    small = compress(model, 0.9, skip=())
    assert sorted(ranks_of(small)) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]
    assert small.lm_head.weight is small.transformer.wte.weight
    ids = torch.arange(10)[None]
    assert torch.linalg.norm(small(ids).logits - model(ids).logits) < 0.2 * torch.linalg.norm(model(ids).logits)


def test_falcons_linear_layers_are_plain_ones():
    model = FalconModel(FalconConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=50)).eval()
    small = compress(model, ranks={"*query_key_value": 4})
    assert sorted(name.split(".", 2)[2] for name in ranks_of(small)) == [
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        "self_attention.dense",
        "self_attention.query_key_value",
    ]
    layer, x = FalconLinear(16, 24), torch.randn(3, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_stay_dense():
    small = compress(nn.Sequential(nn.Linear(0, 0), nn.Linear(0, 5), nn.Linear(16, 16)))
    assert set(ranks_of(small)) == {"2"}


def test_model_made_under_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    small = compress(model)
    assert set(ranks_of(small)) == {"0"}
    small(torch.randn(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_module_used_twice_is_factored_once():
    shared = nn.Linear(16, 16)
    small = compress(nn.Sequential(shared, nn.ReLU(), shared))
    assert isinstance(small[0], LowRankLinear)
    assert small[0] is small[2]


def test_layers_other_code_reads_stay_dense():
    """Attention's own projection is a subclass; a hook would be lost."""
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2), "hooked": nn.Linear(16, 16), "free": nn.Linear(16, 16)})
    model["hooked"].register_forward_hook(lambda *_: None)
    assert set(ranks_of(compress(model))) == {"free"}


@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layers_of_pytorch_call_their_factored_layers(masked: bool):
    """Their fast path would multiply the factors out."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = compress(nn.TransformerEncoder(layer, num_layers=2).eval(), 0.5)
    x, padding = torch.randn(3, 8, 32), torch.zeros(3, 8, dtype=torch.bool)
    padding[:, 6:] = masked
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    assert len(called) == 4
    with_gradients = model(x, src_key_padding_mask=padding).detach()  # never by the fast path
    torch.testing.assert_close(fast[:, :6], with_gradients[:, :6])


def test_the_model_may_be_a_single_layer():
    small = compress(nn.Linear(16, 16))
    assert isinstance(small, LowRankLinear)
    torch.testing.assert_close(small.weight, small.up.weight @ small.down.weight)
    assert (small.in_features, small.out_features, small.rank) == (16, 16, 4)


class TestCalibrated:
    def test_outputs_are_closer_than_by_plain_svd(self, block: Block):
        x = torch.randn(500, 48) * torch.logspace(0, -3, 48)
        plain = compress(block, 0.3)
        calibrated = compress(block, 0.3, calibrate=lambda model: model(x))
        dense = block(x)
        assert torch.linalg.norm(calibrated(x) - dense) < 0.5 * torch.linalg.norm(plain(x) - dense)

    def test_a_calibration_that_runs_nothing(self, block: Block):
        with pytest.raises(CompressionError, match="calibrate ran none of the layers to factor"):
            compress(block, calibrate=lambda model: Block()(torch.randn(2, 48)))

    def test_layers_that_do_not_run_get_the_plain_decomposition(self, block: Block):
        plain = compress(block)
        calibrated = compress(block, calibrate=lambda model: model.query(torch.randn(100, 48)))
        by_plain, by_data = plain.state_dict(), calibrated.state_dict()
        assert torch.equal(by_plain["up.up.weight"], by_data["up.up.weight"])
        assert not torch.equal(by_plain["query.up.weight"], by_data["query.up.weight"])

    def test_a_single_sample_and_a_keyword_argument(self, block: Block):
        x = torch.randn(48)
        by_vector = compress(block, calibrate=lambda model: model.query(x))
        by_keyword = compress(block, calibrate=lambda model: model.query(input=x[None]))
        assert torch.equal(by_vector.query.weight, by_keyword.query.weight)
        assert not torch.equal(by_vector.query.weight, compress(block).query.weight)

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
    def test_inputs_not_finite(self, block: Block, value: float):
        with pytest.raises(CompressionError, match="calibrate gave 'query' inputs that are NaN, infinite"):
            compress(block, calibrate=lambda model: model(torch.full((3, 48), value)))

    def test_no_hook_remains(self, block: Block):
        def interrupted(model: Block):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(block, calibrate=interrupted)
        assert not any(module._forward_pre_hooks for module in block.modules())


class TestRefusals:
    @pytest.mark.parametrize("keep_ratio", [0, 1, 1.5, -0.1, math.nan])
    def test_keep_ratio_out_of_range(self, block: Block, keep_ratio: float):
        with pytest.raises(CompressionError, match=rf"keep_ratio.*{keep_ratio}"):
            compress(block, keep_ratio)

    @pytest.mark.parametrize("rank", [0, -3, 2.5, True])
    def test_rank_no_positive_integer(self, block: Block, rank: int):
        with pytest.raises(CompressionError, match=rf"'query'.*{rank}"):
            compress(block, ranks={"query": rank})

    @pytest.mark.parametrize("keep_ratio", ["0.5", None, True, [0.5]])
    def test_keep_ratio_no_number(self, block: Block, keep_ratio):
        with pytest.raises(
            CompressionError, match=f"keep_ratio must be between 0 and 1, not {re.escape(repr(keep_ratio))}"
        ):
            compress(block, keep_ratio)

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ({"ranks": 4}, "ranks must map patterns of layer names to ranks, not 4"),
            ({"ranks": ["up"]}, r"ranks must map patterns of layer names to ranks, not \['up'\]"),
            ({"ranks": {1: 4}}, "ranks must map patterns of layer names to ranks, not 1"),
            ({"skip": None}, "skip must be patterns of layer names, not None"),
            ({"skip": [3]}, r"skip must be patterns of layer names, not \[3\]"),
            ({"targets": None}, "targets must be patterns of layer names, not None"),
            ({"targets": []}, "targets has no pattern; '[*]' fits all layers"),
            ({"calibrate": 3}, "calibrate must be a function that runs the model, not 3"),
            ({"calibrate": {"x": torch.zeros(99)}}, "a function that runs the model, not an object of type dict$"),
        ],
    )
    def test_argument_of_another_type(self, block: Block, argument: dict, message: str):
        with pytest.raises(CompressionError, match=message):
            compress(block, **argument)

    @pytest.mark.parametrize("where", [{"ranks": {"nowhere.*": 4}}, {"targets": ["nowhere.*"]}])
    def test_pattern_fits_nothing(self, block: Block, where: dict):
        with pytest.raises(CompressionError, match=r"'nowhere\.\*'"):
            compress(block, **where)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Linear(1, 1), "no layer that low rank would make smaller"),
            (nn.Sequential(nn.Linear(0, 5)), "'0' stays dense: it is empty, 5 x 0"),
            (nn.LayerNorm(8), "LayerNorm has no layer that can be factored: it has neither nn.Linear nor Conv1D"),
            (nn.MultiheadAttention(8, 2), "NonDynamicallyQuantizableLinear has hooks or is a subclass of nn.Linear"),
            (LowRankLinear(nn.Linear(8, 2), nn.Linear(2, 8)), "LowRankLinear has no layer .*: 1 are low-rank already"),
        ],
    )
    def test_nothing_to_factor(self, model: nn.Module, message: str):
        with pytest.raises(CompressionError, match=message):
            compress(model)

    @pytest.mark.parametrize("rank", [12, 1000])
    def test_rank_too_high(self, rank: int):
        largest = compress(nn.Sequential(nn.Linear(16, 48)), ranks={"*": 11})
        assert set(ranks_of(largest).values()) == {11}
        message = f"'0' stays dense: two factors of rank {rank} are not smaller than 48 x 16, .* up to rank 11"
        with pytest.raises(CompressionError, match=message):
            compress(nn.Sequential(nn.Linear(16, 48)), ranks={"*": rank})

    def test_everything_is_skipped(self, block: Block):
        with pytest.raises(CompressionError, match=r"skip leaves out query, up, down, classifier$"):
            compress(block, skip="*")

    def test_state_dict(self, block: Block):
        with pytest.raises(CompressionError, match=r"must be an nn\.Module, not an object of type OrderedDict$"):
            compress(block.state_dict())  # pyright: ignore

    @pytest.mark.parametrize("model", [None, "bert", nn.Linear])
    def test_no_module(self, model):
        with pytest.raises(CompressionError, match=re.escape(f"the model must be an nn.Module, not {model!r}")):
            compress(model)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_model_with_a_lock(self, block: Block):
        block.lock = threading.Lock()  # pyright: ignore[reportArgumentType]
        with pytest.raises(CompressionError, match=r"Block cannot be copied: .*lock"):
            compress(block)

    def test_scripted_module(self):
        scripted = torch.jit.script(nn.Linear(16, 16))
        with pytest.raises(CompressionError, match="the model is a ScriptModule"):
            compress(scripted)
        with pytest.raises(CompressionError, match="the module '1' is a ScriptModule"):
            compress(nn.Sequential(nn.Linear(16, 16), scripted))

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    @pytest.mark.parametrize(
        "parametrise", [weight_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5)]
    )
    def test_weight_computed_from_others(self, parametrise):
        model = nn.Sequential(nn.Linear(16, 16), parametrise(nn.Linear(16, 16)))
        with pytest.raises(CompressionError, match=r"'weight' of the module '1' is computed .*remove the parametris"):
            compress(model)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
    def test_weight_of_another_dtype(self, block: Block, dtype: torch.dtype):
        block.up.weight = nn.Parameter(block.up.weight.to(dtype))
        with pytest.raises(CompressionError, match=f"the weight of 'up' is {dtype}; valid: torch.float16, torch.bf"):
            compress(block)

    def test_weight_not_finite(self, block: Block):
        block.up.weight.data[0, 0] = math.inf
        with pytest.raises(CompressionError, match="the weight of 'up' has values that are NaN or infinite"):
            compress(block)

    def test_weight_without_data(self):
        with pytest.raises(CompressionError, match="meta"):
            compress(nn.Linear(16, 16, device="meta"))
