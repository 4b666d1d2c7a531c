"""The factored modules that people's tools write, rebuilt small: what is rewritten of each, and that it stays right."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

import flashsvd_compile as fsvd
from flashsvd_compile.report import RefusalReason, RewriteReport
from tests.models.compiled import Compiled
from tests.ops.accuracy import FACTOR, relative_error

from . import asvd, basis_sharing, dobi_svd, flashsvd, lems, mla, palu, svd_llm
from .decoder import LAYERS, VOCABULARY

BATCH, LENGTH = 3, 9


class Form(NamedTuple):
    """A model and the regions that its layers have: attentions, MLPs, pairs on their own."""

    build: Callable[[], nn.Module]
    attentions: int = 1
    mlps: int = 1
    linears: int = 0


FORMS = {
    "SVD-LLM": Form(svd_llm.build),
    "ASVD": Form(asvd.build),
    "LEMS, separate bias": Form(lems.build),
    "LEMS, bias in place": Form(partial(lems.build, in_place=True)),
    "Basis Sharing": Form(basis_sharing.build),
    "Dobi-SVD": Form(dobi_svd.build),
    "FlashSVD, einsum": Form(flashsvd.build),
    "FlashSVD, matmul": Form(partial(flashsvd.build, einsum=False)),
    "Palu": Form(palu.build),
    "Palu, a group a head": Form(partial(palu.build, ranks=(3, 5, 2, 4))),
    "DeepSeek MLA": Form(mla.build, attentions=0, linears=1),
    "DeepSeek MLA without norms": Form(partial(mla.build, norms=False), attentions=0, linears=2),
}


def made(name: str) -> nn.Module:
    """The model with scores and activations of order one."""
    torch.manual_seed(0)
    model = FORMS[name].build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.normal_(1.0, 0.1)
    return model


def inputs(batch: int = BATCH, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Token indices, the items padded on the left by 0, 1, 2 ... positions."""
    mask = torch.arange(length) >= torch.arange(batch)[:, None]
    return {"input_ids": torch.randint(VOCABULARY, (batch, length)), "attention_mask": mask.long()}


def assert_as_right_as_unfused(model: nn.Module, compiled: Callable, **arguments) -> None:
    exact, unfused = copy.deepcopy(model).double()(**arguments), model(**arguments)
    error, allowed = (relative_error(result, exact) for result in (compiled(**arguments), unfused))
    assert error <= max(FACTOR * allowed, 2 * torch.finfo(unfused.dtype).eps)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_form(name, dynamic):
    model, form = made(name), FORMS[name]
    compiled = Compiled(model, inner="aot_eager", dynamic=dynamic)
    for length in (LENGTH, 12) if dynamic else (LENGTH,):
        assert_as_right_as_unfused(model, compiled, **inputs(length=length))
    assert len(compiled.reports) == 1, "a graph break or a recompilation"
    assert _counts(compiled.report) == [LAYERS * count for count in form[1:]], compiled.report


def _counts(report: RewriteReport) -> list[int]:
    return [report.count(kind) for kind in ("attention", "mlp", "linear")]


def test_the_backend_by_its_name_compiles_one_whole_graph():
    model = made("SVD-LLM")
    compiled = torch.compile(model, backend="flashsvd", options={"inner": "aot_eager"}, fullgraph=True)
    assert_as_right_as_unfused(model, compiled, **inputs())
    report = fsvd.last_report()
    assert report is not None and _counts(report) == [LAYERS, LAYERS, 0]


@pytest.mark.parametrize("name", ["DeepSeek MLA", "DeepSeek MLA without norms"])
def test_the_attention_of_mla_is_refused_by_name_and_its_latent_stays(name):
    model = made(name)
    compiled = Compiled(model, inner="aot_eager")
    arguments = inputs()
    assert_as_right_as_unfused(model, compiled, **arguments)
    assert {refusal.reason for refusal in compiled.report.refusals} == {RefusalReason.UNSUPPORTED_ATTENTION}
    compiled(**arguments)
    attentions = [module for module in model.modules() if isinstance(module, mla.Attention)]
    kept = [attention.cache for attention in attentions]
    model(**arguments)
    for latent, attention in zip(kept, attentions, strict=True):
        torch.testing.assert_close(latent, attention.cache)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["FlashSVD, einsum", "FlashSVD, matmul"])
def test_factors_of_each_head_stay_factors_where_scores_are_taken_in_rank_space(name, inner):
    """Of any length, and with the weights of another checkpoint."""
    model = made(name)
    options = {"inner": inner, "strategy": "absorbed"}
    compiled = torch.compile(model, backend="flashsvd", options=options, dynamic=True, fullgraph=True)
    assert_as_right_as_unfused(model, compiled, **inputs())
    report = fsvd.last_report()
    assert report is not None and [match.kind for match in report.matches if match.strategy == "absorbed"] == (
        ["attention"] * LAYERS
    )
    model.load_state_dict({key: value.flip(0) for key, value in model.state_dict().items()})
    assert_as_right_as_unfused(model, compiled, **inputs(batch=10, length=12))
    assert fsvd.last_report() is report, "a recompilation"
