"""The backend end to end, on small modules with factored linear layers."""

import copy
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor.runtime import compile_tasks
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import flashsvd_compile
from flashsvd_compile import (
    Match,
    Options,
    Refusal,
    RefusalReason,
    RewriteReport,
    backend,
    explain,
    last_report,
    rewrite,
)
from flashsvd_compile.errors import GraphError, ModelError

FEATURES, WIDTH, RANK, HEADS = 32, 64, 6, 4


class LowRank(nn.Module):
    def __init__(self, in_features, out_features, rank=RANK):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x):
        return self.up(self.down(x))


class Block(nn.Module):
    """A transformer block before its normalisations became fashionable."""

    def __init__(self, rank=RANK):
        super().__init__()
        self.q, self.k, self.v, self.out = (LowRank(FEATURES, FEATURES, rank) for _ in range(4))
        self.norm = nn.LayerNorm(FEATURES)
        self.fc1, self.fc2 = LowRank(FEATURES, WIDTH, rank), LowRank(WIDTH, FEATURES, rank)

    def heads(self, y):
        return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(member(x)) for member in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(attended))
        return x + self.fc2(functional.gelu(self.fc1(x)))


@pytest.fixture
def block():
    torch.manual_seed(0)
    torch.compiler.reset()
    return nn.Sequential(Block(), Block()).eval()


def latest() -> RewriteReport:
    report = last_report()
    assert report is not None
    return report


def sample(batch=2, length=7):
    return torch.randn(batch, length, FEATURES, generator=torch.Generator().manual_seed(batch * 100 + length))


def compiled(model, dynamic=None, mode=None, **options):
    if mode is not None:
        return torch.compile(model, backend="flashsvd", dynamic=dynamic, mode=mode)
    return torch.compile(model, backend="flashsvd", dynamic=dynamic, options={"inner": "eager", **options})


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_model_gives_the_same_result_under_every_inner_backend(block, inner):
    x = sample()
    with torch.no_grad():
        result = compiled(block, inner=inner)(x)
        torch.testing.assert_close(result, block(x))
    report = latest()
    assert (report.count("attention"), report.count("mlp"), report.count("linear")) == (2, 2, 0)
    assert [match.module for match in report.matches] == ["0", "1", "0", "1"]


@pytest.fixture
def patches(monkeypatch) -> list[dict]:
    """The configuration that each compilation gives to Inductor, which then compiles nothing."""
    import torch._inductor.compile_fx as inductor

    seen = []
    monkeypatch.setattr(
        inductor, "compile_fx", lambda gm, *_, config_patches: seen.append(config_patches) or gm.forward
    )
    return seen


def test_a_mode_reaches_inductor(block, patches):
    among_options: dict[str, Any] = {"mode": "reduce-overhead"}
    with torch.no_grad():
        for mode, options in ((None, None), ("reduce-overhead", None), (None, among_options)):
            torch.compiler.reset()
            torch.compile(block, backend="flashsvd", mode=mode, options=options)(sample())
    sums = {"realize_reads_threshold": 2}
    assert patches == [sums, *[sums | {"triton.cudagraphs": True}] * 2]


def test_what_a_mode_compiles_gives_the_same_result(block):
    with torch.inference_mode():
        x = sample()
        torch.testing.assert_close(compiled(block, mode="max-autotune-no-cudagraphs")(x), block(x))


def test_without_a_match_inductor_is_as_always(patches):
    with torch.no_grad():
        compiled(torch.nn.Linear(8, 8), inner="inductor", mode=None)(torch.randn(2, 8))
    assert patches == [{}]


def test_one_graph_serves_all_lengths_and_batches(block):
    graphs = []

    def counting(graph_module, example_inputs, **kwargs):
        graphs.append(graph_module)
        return flashsvd_compile.backend.flashsvd(graph_module, example_inputs, options={"inner": "eager"})

    fast = torch.compile(block, backend=counting, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 5), (4, 19), (2, 64)):
            torch.testing.assert_close(fast(sample(batch, length)), block(sample(batch, length)))
    assert len(graphs) == 1
    assert (latest().count("attention"), latest().count("mlp")) == (2, 2)


def test_features_that_a_model_asks_its_input_for(block):
    """Under ``dynamic=True`` their number is a symbol that was found to be a number."""

    def function(x):
        batch, length, features = x.shape
        return block(x).view(batch * length, features)

    with torch.no_grad():
        fast = torch.compile(function, backend="flashsvd", dynamic=True, options={"strategy": "streamed"})
        torch.testing.assert_close(fast(sample()), function(sample()))
    assert latest().count("attention") == 2


def test_mark_dynamic_needs_one_graph(block):
    fast = compiled(block)
    with torch.no_grad():
        x = sample(2, 8)
        torch._dynamo.mark_dynamic(x, 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (8, 5, 33):
                x = sample(2, length)
                torch._dynamo.mark_dynamic(x, 1)
                torch.testing.assert_close(fast(x), block(x))
    assert latest().count("attention") == 2


def test_the_report_of_a_dynamic_graph_has_formulas(block):
    with torch.no_grad():
        compiled(block, dynamic=True)(sample())
    assert all(match.transient_before.free_symbols for match in latest().matches)
    assert "bytes" in str(latest())


def test_a_reloaded_state_dict_gives_the_new_weights_answer(block):
    fast = compiled(block, inner="aot_eager")
    with torch.no_grad():
        fast(sample())
        torch.manual_seed(1)
        block.load_state_dict(nn.Sequential(Block(), Block()).state_dict())
        torch.testing.assert_close(fast(sample()), block(sample()))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_gradients_are_those_of_the_plain_model(block, inner):
    fast, x = compiled(block.train(), inner=inner), sample().requires_grad_()
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    actual = torch.autograd.grad(fast(x).square().sum(), [x, *block.parameters()])
    assert latest().count("mlp") == 2
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_regions_under_activation_checkpointing(block, inner, dynamic):
    def checkpointed(x):
        return checkpoint(block, x, use_reentrant=False)

    x = sample().requires_grad_()
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    result = compiled(checkpointed, dynamic, inner=inner)(x)
    actual = torch.autograd.grad(result.square().sum(), [x, *block.parameters()])
    assert latest().count("attention") == 2
    torch.testing.assert_close(actual, expected)
    assert explain(checkpointed, x).count("mlp") == 2


def test_a_first_factor_without_gradients_stays_without(block):
    layer = block[0].q

    def function(x):
        with torch.no_grad():
            latent = layer.down(x)
        return layer.up(latent)

    x = sample().requires_grad_()
    function(x).square().sum().backward()
    expected = layer.up.weight.grad.clone()
    layer.zero_grad()
    compiled(function)(x).square().sum().backward()
    assert [refusal.reason for refusal in latest().refusals] == [RefusalReason.MODE_CHANGED]
    assert layer.down.weight.grad is x.grad is None
    torch.testing.assert_close(layer.up.weight.grad, expected)


def test_a_module_called_twice_in_one_graph(block):
    def twice(x):
        return block(block(x))

    with torch.no_grad():
        torch.testing.assert_close(compiled(twice)(sample()), twice(sample()))
    assert latest().count("attention") == 4


def test_disabled_rules_do_not_run(block):
    with torch.no_grad():
        compiled(block, disable=["attention", "mlp"])(sample())
        assert (latest().count("attention"), latest().count("mlp"), latest().count("linear")) == (
            0,
            0,
            12,
        )
        torch.compiler.reset()
        compiled(block, disable=["attention", "mlp", "linear"])(sample())
        assert latest().matches == []


def test_strategy_kept_leaves_the_graph_alone(block):
    with torch.no_grad():
        compiled(block, strategy="kept")(sample())
    assert latest().matches == []
    assert {refusal.reason for refusal in latest().refusals} == {RefusalReason.UNPROFITABLE}


@pytest.mark.parametrize(
    ("strategy", "rank", "attention", "mlp"),
    [
        ("streamed", RANK, "streamed", "streamed"),
        ("absorbed", RANK, "absorbed", "streamed"),
        ("merged", 24, "merged", "merged"),
        ("merged", RANK, "streamed", "streamed"),
    ],
)
def test_every_strategy_of_a_cpu_gives_the_same_result(strategy, rank, attention, mlp):
    """The one that is asked for, where a region has it; factors of rank 24 hold more than their product."""
    torch.compiler.reset()
    block = Block(rank).eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(block, strategy=strategy)(sample()), block(sample()))
    assert {match.kind: match.strategy for match in latest().matches} == {"attention": attention, "mlp": mlp}


def test_a_small_memory_budget_bounds_workspaces_and_gives_the_same_result(block, capsys):
    with torch.no_grad():
        fast = compiled(block, memory_budget=4096, debug=True)
        torch.testing.assert_close(fast(sample()), block(sample()))
    assert capsys.readouterr().out.count("workspace_bytes = 4096") == 4


def test_a_dense_model_compiles_and_the_report_says_that_nothing_matched():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, inner="inductor")(x), model(x))
    assert latest().matches == latest().refusals == []


def test_autocast_computes_as_the_plain_model(block):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = sample()
        torch.testing.assert_close(compiled(block)(x), block(x))
    assert (latest().count("attention"), latest().count("mlp")) == (2, 2)


def test_a_report_prints_brackets_and_counts_layers_that_are_alike():
    sentence = "q of 'x' cannot be followed to a projection of [batch, len, features]"
    sites = [f"layers.{i}.[/b]" for i in range(3)]
    report = RewriteReport([], [Refusal(RefusalReason.UNSUPPORTED_ATTENTION, site, sentence) for site in sites])
    printed = " ".join(str(report).split())
    assert "flashsvd: 3 sites left alone" in printed and "layers.0.[/b] and 2 more" in printed
    assert "[batch, len, features]" in printed


def test_a_report_counts_each_kind_of_region_that_is_left_alone_apart(block):
    """The projections of a region that stays are tried one by one, and stay, too: no sites of their own."""
    with torch.no_grad():
        printed = str(explain(block, sample(), options={"strategy": "kept"}))
    rows = [[cell.strip() for cell in line.split("│")[2:4]] for line in printed.splitlines() if "unprofitable" in line]
    assert [row[1].split()[0] for row in rows] == ["attention", "mlp"]
    assert [row[0].split(" and ")[1] for row in rows] == ["1 more", "1 more"]
    assert "4 sites left alone" in printed


def test_a_report_says_what_to_attach_where_a_region_was_misread():
    refusals = [Refusal(reason, "layer", "sentence") for reason in RefusalReason]
    printed = " ".join(str(RewriteReport(refusals=refusals)).replace("│", " ").split())
    assert printed.count("please report it with the folder that options={'debug': 'folder'} writes and what") == 1
    assert "`flashsvd --version` prints" in printed


def test_one_region_is_no_regions():
    match = Match("mlp", "layer", {}, "streamed", "why", sympy.Integer(1), sympy.Integer(1))
    assert "flashsvd: 1 region rewritten" in str(RewriteReport([match]))
    assert "flashsvd: 2 regions rewritten" in str(RewriteReport([match, match]))


def test_every_layer_that_is_left_alone_is_reported(small_regions_stay):
    torch._dynamo.reset()
    model = nn.Sequential(*(LowRank(FEATURES, FEATURES) for _ in range(3)))
    with torch.no_grad():
        compiled(model)(sample())
    refusals = [refusal for refusal in latest().refusals if refusal.reason == RefusalReason.UNPROFITABLE]
    assert [refusal.site for refusal in refusals] == ["0", "1", "2"]


def test_explain_reports_and_compiles_nothing(block):
    before = last_report()
    with torch.no_grad():
        report = explain(block, sample())
    assert (report.count("attention"), report.count("mlp")) == (2, 2)
    assert last_report() is before


def test_explain_says_that_nothing_was_traced(block, caplog):
    with torch.compiler.set_stance("force_eager"):
        assert explain(block, sample()).is_empty
    assert "Dynamo has traced nothing" in caplog.text


def test_explain_takes_options_and_keywords(block):
    with torch.no_grad():
        assert explain(lambda x: block(x), x=sample(), options={"disable": "mlp"}).count("mlp") == 0


CALLS = {
    "a module": lambda model, x: explain(model, x),
    "its method": lambda model, x: explain(model.forward, x),
    "a closure": lambda model, x: explain(lambda x: model(x), x),
    "a function of the module": lambda model, x: explain(lambda given, x: given(x), model, x),
    "a function of a list": lambda model, x: explain(lambda models, x: models[0](x), [model], x),
}


@pytest.mark.parametrize("call", CALLS)
def test_modules_have_their_names_however_they_are_called(block, call):
    with torch.no_grad():
        report = CALLS[call](nn.Sequential(block), sample())
    assert [match.module for match in report.matches] == ["0.0", "0.1", "0.0", "0.1"]


def test_names_of_modules_may_be_any():
    layers = nn.ModuleDict({"layer-1": LowRank(FEATURES, FEATURES), "a b/c": LowRank(FEATURES, FEATURES)})

    def function(x):
        for layer in layers.values():
            x = layer(x)
        return x

    with torch.no_grad():
        report = explain(function, sample(), options={"strategy": "streamed"})
    assert [match.module for match in report.matches] == ["layer-1", "a b/c"]


def test_a_function_of_a_module_that_was_compiled_in_place_is_explained(block):
    block.compile(backend="flashsvd", options={"inner": "eager"})
    with torch.no_grad():
        for function, inputs in (
            (lambda x: block(x), (sample(),)),
            (lambda model, x: model(x), (block, sample())),
            (block.forward, (sample(),)),
        ):
            assert explain(function, *inputs).count("attention") == 2


@pytest.mark.parametrize("whole", [False, True])
def test_a_module_that_was_compiled_in_place_is_explained(block, whole):
    for module in [block] if whole else block:
        module.compile(backend="flashsvd", options={"inner": "eager"})
    with torch.no_grad():
        assert explain(block, sample()).count("attention") == 2
        assert all(module._compiled_call_impl is not None for module in ([block] if whole else block))
        torch.testing.assert_close(block(sample()), block.forward(sample()))


def test_options_as_an_object(block):
    with torch.no_grad():
        assert explain(block, sample(), options=Options(disable=frozenset({"mlp"}))).count("mlp") == 0


@pytest.mark.parametrize("model", [None, "bert"])
def test_what_cannot_be_called_is_not_explained(model):
    with pytest.raises(ModelError, match=f"the model must be a module or a function, not {model!r}"):
        explain(model, sample())


def test_what_cannot_be_rewritten_is_named(block):
    with pytest.raises(GraphError, match=r"an object of type Sequential is not a graph; .* graph_module of a program"):
        rewrite(block)
    with pytest.raises(GraphError, match="the graph of x carries no example values"):
        rewrite(torch.fx.symbolic_trace(LowRank(FEATURES, WIDTH)))
    with pytest.raises(GraphError, match=r"the graph of arg0_1 carries example values of \d+ fake modes"):
        rewrite(make_fx(LowRank(FEATURES, WIDTH))(sample()))


def test_the_backend_leaves_a_graph_without_example_values_alone():
    model = LowRank(FEATURES, WIDTH)
    run = backend.flashsvd(torch.fx.symbolic_trace(model), [sample()], options={"inner": "eager"})
    torch.testing.assert_close(run(sample()), model(sample()))
    assert latest().matches == []


def test_debug_prints_the_report_and_both_graphs(block, capsys):
    with torch.no_grad():
        compiled(block[0], debug=True)(sample())
    printed = capsys.readouterr().out
    assert "scaled_dot_product_attention" in printed.split("# after")[0]
    assert "torch.ops.flashsvd.attention_v5" in printed.split("# after")[1]
    assert "2 regions rewritten" in printed


def test_debug_writes_a_directory_per_graph(block, tmp_path):
    with torch.no_grad():
        compiled(block[0], debug=tmp_path)(sample())
        torch.compiler.reset()
        compiled(block[1], debug=str(tmp_path))(sample())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_0", "graph_1"]
    assert "scaled_dot_product_attention" in (tmp_path / "graph_0" / "before.py").read_text()
    assert "flashsvd.attention_v5" in (tmp_path / "graph_1" / "after.py").read_text()
    assert "2 regions rewritten" in (tmp_path / "graph_1" / "report.txt").read_text()


def test_processes_that_compile_at_once_may_write_to_one_directory(block, tmp_path, monkeypatch):
    """Each finds that no folder is there, and makes one."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with torch.no_grad():
        for _ in range(2):
            torch.compiler.reset()
            compiled(block[0], debug=tmp_path)(sample())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_0", "graph_1"]


def test_the_log_shows_the_passes_at_work(block, caplog):
    with caplog.at_level(logging.DEBUG, logger="flashsvd_compile"), torch.no_grad():
        compiled(block)(sample())
    assert "kind='attention'" in caplog.text


def test_the_backend_is_found_without_importing_the_package():
    program = (
        "import sys, torch; model = torch.nn.Linear(4, 4); "
        "assert 'flashsvd' in torch.compiler.list_backends(); assert 'flashsvd_compile' not in sys.modules; "
        "torch.compile(model, backend='flashsvd', options={'inner': 'eager'})(torch.randn(2, 4))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_model_that_moves_to_another_device_and_back(block):
    model, x = compiled(block, inner="aot_eager"), sample()
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(model(x), expected)
        saved = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        block.to("meta")
        assert model(x.to("meta")).is_meta
        assert {refusal.reason for refusal in latest().refusals} == {RefusalReason.UNSUPPORTED_DEVICE}
        block.to_empty(device="cpu").load_state_dict(saved)
        torch.testing.assert_close(model(x), expected)


def test_inference_mode_computes_as_the_plain_model(block):
    model = compiled(block, inner="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(model(sample()), block(sample()))
    assert latest().count("attention") == latest().count("mlp") == 2


@pytest.mark.usefixtures("small_regions_stay")
def test_small_regions_on_a_cpu_are_left_to_inductor_unless_they_keep_intermediates_for_gradients(block):
    model = compiled(block, inner="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(model(sample()), block(sample()))
        assert not latest().matches
        assert {refusal.reason for refusal in latest().refusals} == {RefusalReason.UNPROFITABLE}
    torch.testing.assert_close(model(sample()), block(sample()))
    assert latest().count("attention") == latest().count("mlp") == 2
    torch._dynamo.reset()
    frozen = copy.deepcopy(block).requires_grad_(False)
    torch.testing.assert_close(compiled(frozen, inner="aot_eager")(sample()), frozen(sample()))
    assert not latest().matches


class Reader(Block):
    """Attention to a context."""

    def forward(self, x, context):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = self.heads(self.q(x)), self.heads(self.k(context)), self.heads(self.v(context))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("small_regions_stay")
@pytest.mark.parametrize("which", [0, 1])
def test_a_small_region_is_rewritten_where_one_of_its_inputs_wants_gradients(which):
    torch.manual_seed(0)
    torch.compiler.reset()
    reader, inputs = Reader().eval().requires_grad_(False), [sample(), sample()]
    model = compiled(reader, inner="aot_eager")
    torch.testing.assert_close(model(*inputs), reader(*inputs))
    assert not latest().matches
    inputs[which].requires_grad_()
    torch.testing.assert_close(model(*inputs), reader(*inputs))
    assert latest().count("attention") == 1


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(LowRank(FEATURES, WIDTH), nn.GELU(), LowRank(WIDTH, FEATURES))


def tangent(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).square().sum())(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x.cos(),))[1],
    "vmap": lambda function, x: torch.func.vmap(lambda x: function(x))(x),
    "jacrev": lambda function, x: torch.func.jacrev(lambda x: function(x).square().sum((0, 1)))(x),
    "hessian": lambda function, x: torch.func.hessian(lambda x: function(x).square().sum())(x[0, 0]),
    "forward mode": tangent,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_transformed_in_the_graph_is_left_alone(name):
    """Operators have gradients, and no rules beyond that; forward mode would drop their tangents without a word."""
    mlp, transform, x = two_layers(), TRANSFORMS[name], sample()
    expected = transform(mlp, x)
    torch.testing.assert_close(compiled(lambda x: transform(mlp, x), inner="aot_eager")(x), expected)
    assert latest().count("mlp") == latest().count("linear") == 0
    assert RefusalReason.TRANSFORMED in {refusal.reason for refusal in latest().refusals}


def of_weights(transform):
    """A transform of what an attention or MLP of packed factors does to ``x`` with respect to its weights."""

    linear = functional.linear

    def attention(weights, x):
        down, up, *dense = weights
        q, k, v = linear(linear(x, down), up), *(linear(x, weight) for weight in dense)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def mlp(weights, x):
        down, up, *_ = weights
        gate, hidden = linear(linear(x, down), up).chunk(2, -1)
        return linear(functional.silu(gate) * hidden, up)

    return lambda weights, x: [transform(function, weights, x) for function in (attention, mlp)]


OF_WEIGHTS = {
    "grad": lambda f, weights, x: torch.func.grad(lambda w: f(w, x).square().sum())(weights)[0],
    "vjp": lambda f, weights, x: torch.func.vjp(lambda w: f(w, x).square().sum(), weights)[0],
    "vmap": lambda f, weights, x: torch.func.vmap(f, (0, None))([torch.stack([w, 2 * w]) for w in weights], x),
}


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_transforms_with_respect_to_weights(name):
    """Rules do not even read what is batched or tracked."""
    generator = torch.Generator().manual_seed(0)
    sizes = (FEATURES // 2, FEATURES), (FEATURES, FEATURES // 2), (FEATURES, FEATURES), (FEATURES, FEATURES)
    weights = [torch.randn(*size, generator=generator) for size in sizes]
    function = of_weights(OF_WEIGHTS[name])
    expected = function(weights, sample())
    torch.testing.assert_close(compiled(function, inner="aot_eager")(weights, sample()), expected)


def test_a_write_within_a_transform_beside_a_region():
    mlp, x = two_layers(), sample()

    def function(x):
        return torch.func.grad(lambda x: mlp(x).add_(1).square().sum())(x), mlp(x).add_(1)

    torch.testing.assert_close(compiled(function, inner="aot_eager")(x), function(x))
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_write_within_a_region_of_any_sizes(dynamic):
    """Sizes among what later nodes read are no tensors (MPNet)."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (LowRank(FEATURES, FEATURES) for _ in range(3))

        def forward(self, x, bias):
            batch, length, _ = x.shape
            q, k, v = (p(x).view(batch, length, 2, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
            scores = q @ k.transpose(-1, -2) / 4
            scores += bias
            return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, FEATURES)

    model, x = Attention(), sample()
    bias = torch.randn(len(x), 1, x.shape[1], x.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, dynamic)(x, bias), model(x, bias))
    assert latest().count("attention") == 1


def test_a_branch_within_a_transform_is_left_alone():
    model, x = two_layers(), sample()

    def function(x):
        branch = functools.partial(torch.cond, true_fn=model, false_fn=lambda x: model(2 * x))
        return torch.func.vmap(lambda x: branch(x.sum() > 0, operands=(x,)))(x)

    with torch.no_grad():
        torch.testing.assert_close(compiled(function, inner="aot_eager")(x), function(x))
    assert latest().count("mlp") == 0
    assert RefusalReason.TRANSFORMED in {refusal.reason for refusal in latest().refusals}


def test_a_transformed_mask_is_no_transformed_region():
    """As transformers makes its masks: the region that comes after is rewritten."""

    def function(model, x):
        visible = torch.func.vmap(lambda position: position >= 0)(torch.arange(x.shape[1]))
        return model(x) * visible[:, None]

    model, x = two_layers(), sample()
    with torch.no_grad():
        torch.testing.assert_close(compiled(lambda x: function(model, x))(x), function(model, x))
    assert latest().count("mlp") == 1


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_empty_inputs(block, shape):
    with torch.no_grad():
        x = sample(*shape)
        torch.testing.assert_close(compiled(block, inner="inductor")(x), block(x))
    assert latest().count("attention") == latest().count("mlp") == 0


class Named(torch.Tensor):
    """A subclass that changes nothing."""


class NamedParameter(nn.Parameter):
    """A parameter that changes nothing."""


@pytest.mark.parametrize("which", ["input", "weight"])
def test_subclasses_by_name_only(which):
    model, x = two_layers(), sample()
    first = model[0]
    assert isinstance(first, LowRank)
    with torch.no_grad():
        expected = model(x)
        if which == "weight":
            first.up.weight = NamedParameter(first.up.weight)
        given = x.as_subclass(Named) if which == "input" else x
        torch.testing.assert_close(compiled(model, inner="inductor")(given).as_subclass(torch.Tensor), expected)
    assert RefusalReason.TENSOR_SUBCLASS in {refusal.reason for refusal in latest().refusals}


class TestKernelsAsInductors:
    """Where Triton keeps the operators' kernels once a graph that has them is compiled, and what assembles them."""

    @pytest.fixture(autouse=True)
    def _as_a_new_process(self, monkeypatch):
        # Set first, so that the test's end undoes what the backend sets.
        for variable in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
            monkeypatch.setenv(variable, "somewhere")
            monkeypatch.delenv(variable)

    def compile_for(self, *devices: str) -> str | None:
        with FakeTensorMode():
            inputs = [3, *(torch.empty(2, device=device) for device in devices)]
        backend._treat_kernels_as_inductors(inputs)
        return os.environ.get("TRITON_CACHE_DIR")

    def test_with_those_of_inductor(self):
        inductors = triton_cache_dir(1)
        assert self.compile_for("cpu", "cuda:1") == inductors

    def test_where_the_user_says(self, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
        assert self.compile_for("cuda:1") == "elsewhere"

    def test_nowhere_on_a_cpu(self):
        assert self.compile_for("cpu") is None

    def test_assembled_as_in_inductors_workers(self, monkeypatch):
        """A kernel's key in Triton's cache has the assembler's version, which differed by who had compiled before."""
        asked = []
        monkeypatch.setattr(compile_tasks, "_set_triton_ptxas_path", lambda: asked.append(None))
        self.compile_for("cpu")
        assert not asked
        self.compile_for("cpu", "cuda:1")
        assert asked

    def test_asked_for_where_a_region_is_rewritten(self, block, monkeypatch):
        asked = []
        monkeypatch.setattr(backend, "_treat_kernels_as_inductors", asked.append)
        with torch.no_grad():
            compiled(block, inner="inductor")(sample())
            compiled(nn.Linear(FEATURES, FEATURES), inner="inductor")(sample())
        assert len(asked) == 1


class TestOperatorsBesideOurs:
    """Compiled code calls our operators directly; whatever else is in it is called as ever."""

    @pytest.fixture
    def slope(self):
        """The gradient of a square, by autograd within an operator."""
        library = torch.library.Library("flashsvd_test_backend", "FRAGMENT")
        library.define("slope(Tensor x) -> Tensor")

        def by_autograd(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                given = x.detach().requires_grad_()
                return torch.autograd.grad(given.square().sum(), given)[0]

        library.impl("slope", by_autograd, "CPU")
        torch.library.register_fake("flashsvd_test_backend::slope", torch.empty_like, lib=library)
        yield torch.ops.flashsvd_test_backend.slope
        library._destroy()

    def test_may_differentiate(self, block, slope):
        x = sample()
        unchecked = functorch_config.patch(check_custom_op_aliasing=False)  # PyTorch's check calls them under a mode
        with torch.no_grad(), unchecked:
            function = compiled(lambda x: slope(block(x)), inner="inductor")
            for _ in range(4):
                torch.testing.assert_close(function(x), 2 * block(x))
        assert latest().matches


FREELY: dict[str, Any] = {"strategy": "streamed"}
"""Rewrites small examples, too."""


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_a_result_is_the_callers_to_change(inner):
    """Also where calls are replayed, and the result is part of a larger allocation."""
    torch.compiler.reset()
    module = Block().requires_grad_()
    compiled = torch.compile(module, backend="flashsvd", options={**FREELY, "inner": inner})
    for _ in range(4):
        x = torch.randn(2, 5, FEATURES)
        result = compiled(x)
        expected = module(x)
        torch.testing.assert_close(result, expected)
        result += 1.0
        result.sum().backward()


def made_without_gradients(x, down, up):
    with torch.no_grad():
        weight = up @ down
    return functional.linear(x, weight)


def transposed_without_gradients(x, down, up):
    with torch.no_grad():
        down = down.t()
    return (x @ down) @ up.t()


@pytest.mark.parametrize("function", [made_without_gradients, transposed_without_gradients])
def test_weights_that_have_no_gradients_here(function):
    torch.compiler.reset()
    x = torch.randn(3, 7, FEATURES)
    found = []
    for call in (function, torch.compile(function, backend="flashsvd", options={**FREELY, "inner": "eager"})):
        torch.manual_seed(0)
        weights = [torch.randn(RANK, FEATURES, requires_grad=True), torch.randn(FEATURES, RANK, requires_grad=True)]
        result = call(x.requires_grad_(), *weights)
        found.append(torch.autograd.grad(result.sum(), (x, *weights), allow_unused=True))
    eager, ours = found
    assert [gradient is None for gradient in ours] == [gradient is None for gradient in eager]
    for gradient, expected in zip(ours, eager, strict=True):
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_an_input_that_changes_before_its_gradients():
    """Frozen weights: eager keeps nothing of the stream, so it may be added to in place."""
    torch.compiler.reset()
    module = LowRank(FEATURES, FEATURES).requires_grad_(requires_grad=False)

    def function(x):
        stream = x * 1.0
        stream += module(stream)
        stream.relu_()
        return stream

    gradients = []
    for call in (function, torch.compile(function, backend="flashsvd", options=FREELY)):
        x = torch.linspace(-1.0, 1.0, 2 * 5 * FEATURES).view(2, 5, FEATURES).requires_grad_()
        call(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_gradients_of_an_item_that_sees_nothing():
    """Attention spelled out, its padding a large negative number beside the scores."""
    torch.compiler.reset()
    weights = [torch.randn(*shape) * 0.3 for _ in range(3) for shape in ((RANK, FEATURES), (FEATURES, RANK))]
    weights = [weight.requires_grad_() for weight in weights]
    padding = torch.zeros(2, 1, 1, 9)
    padding[1] = torch.finfo(torch.float32).min

    def attention(x, padding):
        down_up = zip(weights[::2], weights[1::2], strict=True)
        projected = (functional.linear(functional.linear(x, down), up) for down, up in down_up)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected)
        scores = q @ k.mT * (FEATURES // HEADS) ** -0.5 + padding
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    x, found = torch.randn(2, 9, FEATURES), []
    for call in (attention, torch.compile(attention, backend="flashsvd", options={**FREELY, "inner": "eager"})):
        found.append(torch.autograd.grad(call(x, padding).square().sum(), weights))
    report = last_report()
    assert report is not None and report.count("attention") == 1
    for expected, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


RECTIFIERS = {
    "relu": functional.relu,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "half of a sum": lambda x: (x + x.abs()) / 2,
}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("spelling", RECTIFIERS)
def test_slopes_of_rectifiers_at_zero(spelling, wanted):
    """What is padded is 0 throughout without biases, where ReLU has the slope 0 and others another.

    ``clamp`` has 1 before torch 2.15.
    """
    torch.compiler.reset()
    rectify, zero = RECTIFIERS[spelling], torch.zeros((), requires_grad=True)
    is_relu = torch.autograd.grad(rectify(zero), zero)[0] == 0
    shapes = (RANK, FEATURES), (2 * FEATURES, RANK), (RANK, 2 * FEATURES), (FEATURES, RANK)
    down, up, other_down, other_up = (torch.randn(*shape) for shape in shapes)

    def mlp(x):
        hidden = functional.linear(functional.linear(x, down), up)
        return functional.linear(functional.linear(rectify(hidden), other_down), other_up)

    x, found = torch.randn(2, 9, FEATURES), []
    x[1] = 0.0
    for call in (mlp, torch.compile(mlp, backend="flashsvd", options={**FREELY, "inner": "eager"})):
        given = x.clone().requires_grad_(wanted)
        result = call(given)
        found.append(torch.autograd.grad(result.sum(), given)[0] if wanted else result)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert latest().count("mlp") == (is_relu or not wanted)
