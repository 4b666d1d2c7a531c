"""Documents packed into one item: transformers tells them apart by ``position_ids`` that begin anew."""

import pytest
import torch

from benchmarks.zoo import FAMILIES, VOCABULARY, Inputs
from flashsvd_compile import ops
from flashsvd_compile.measure import peak_activation_bytes

from .compiled import Compiled, assert_as_right_as_unfused, factored


def packed(*lengths: int, batch: int = 1) -> Inputs:
    positions = torch.cat([torch.arange(length) for length in lengths])
    input_ids = torch.randint(3, VOCABULARY, (batch, sum(lengths)))
    return {"input_ids": input_ids, "position_ids": positions.expand(batch, -1), "use_cache": False}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_documents(name, dynamic):
    """Mistral has a window of four keys besides."""
    compiled = Compiled(factored(name), inner="aot_eager", dynamic=dynamic)
    for lengths in ((5, 1, 9), (3, 4)) if dynamic else ((5, 1, 9),):
        assert_as_right_as_unfused(name, compiled, packed(*lengths, batch=2))
    assert len(compiled.reports) == 1
    assert compiled.report.count("attention") == FAMILIES[name].attentions
    assert compiled.report.refusals == []
    regions = compiled.graphs[0].find_nodes(op="call_function", target=ops.attention)
    assert all("documents" in region.kwargs and "mask" not in region.kwargs for region in regions)


def test_documents_do_not_see_each_other():
    compiled = Compiled(factored("Llama"), inner="aot_eager", dynamic=True)
    inputs = packed(40, 50)
    together = compiled(**inputs).last_hidden_state
    inputs["input_ids"][:, :40] = 7
    torch.testing.assert_close(compiled(**inputs).last_hidden_state[:, 40:], together[:, 40:])


def test_no_mask_of_the_whole_length_is_made():
    length = 4096
    compiled = Compiled(factored("Llama"), inner="aot_eager")
    inputs = packed(length // 4, length // 2, length // 4)
    compiled(**inputs)
    peak = peak_activation_bytes(lambda: compiled(**inputs), torch.device("cpu"))
    assert peak < length * length, "bytes of one boolean mask"
