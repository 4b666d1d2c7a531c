"""The rewritten graph through AOTAutograd and through Inductor, and the backend found by its name."""

import pytest
import torch

import flashsvd_compile as fsvd
from benchmarks.zoo import FAMILIES

from .compiled import Compiled, assert_as_right_as_unfused, factored


@pytest.mark.parametrize(("name", "dynamic"), [("BERT", True), ("GPT-2", False), ("Mistral", False), ("T5", False)])
def test_aot_autograd(name, dynamic):
    family, compiled = FAMILIES[name], Compiled(factored(name), inner="aot_eager", dynamic=dynamic)
    assert_as_right_as_unfused(name, compiled, family.inputs(2, 9, "right"))
    assert compiled.report.count("attention") == family.attentions


@pytest.mark.parametrize(("name", "padding", "dynamic"), [("BERT", "right", False), ("Llama", "left", True)])
def test_inductor_by_the_name_of_the_backend(name, padding, dynamic):
    family = FAMILIES[name]
    compiled = torch.compile(factored(name), backend="flashsvd", dynamic=dynamic)
    assert_as_right_as_unfused(name, compiled, family.inputs(2, 9, padding))
    report = fsvd.last_report()
    assert report is not None and report.count("attention") == family.attentions
