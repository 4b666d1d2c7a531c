"""The same rules read graphs of ``torch.export``, where no backend of ``torch.compile`` ever runs."""

import pytest
import torch
from torch.export import Dim, export

from flashsvd_compile import rewrite

from ..test_backend import Block, sample


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


def test_an_exported_block_is_rewritten(block):
    program = export(block, (sample(),))
    report = rewrite(program.graph_module)
    assert (report.count("attention"), report.count("mlp")) == (1, 1)
    torch.testing.assert_close(program.module()(sample()), block(sample()))


def test_an_exported_block_of_dynamic_shape_serves_all_lengths(block):
    program = export(block, (sample(),), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},))
    report = rewrite(program.graph_module)
    assert (report.count("attention"), report.count("mlp")) == (1, 1)
    assert all(match.transient_before.free_symbols for match in report.matches)
    for batch, length in ((2, 7), (3, 19), (1, 1)):
        torch.testing.assert_close(program.module()(sample(batch, length)), block(sample(batch, length)))


def test_what_decomposition_leaves_readable_is_rewritten(block):
    program = export(block, (sample(),)).run_decompositions()
    assert rewrite(program.graph_module).count("mlp") == 1
    torch.testing.assert_close(program.module()(sample()), block(sample()))


def test_a_rewritten_program_can_be_saved(block, tmp_path):
    program = export(block, (sample(),))
    rewrite(program.graph_module)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    torch.testing.assert_close(loaded(sample()), block(sample()))
