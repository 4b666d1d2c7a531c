"""Options are validated once, and a mistake is answered with what would have been right."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flashsvd_compile.backend import flashsvd
from flashsvd_compile.errors import (
    FlashSVDError,
    InvalidOptionError,
    ShapeError,
    TwiceDifferentiatedError,
    UnknownOptionError,
)
from flashsvd_compile.options import Options


def test_defaults():
    options = Options.parse()
    assert options == Options(debug=False, strategy="auto", disable=frozenset(), inner="inductor", mode=None)
    assert not options.autotune and options.compile_ahead


def test_every_option_is_taken():
    options = Options.parse(
        {
            "debug": "out",
            "strategy": "streamed",
            "disable": ["mlp"],
            "inner": "eager",
            "memory_budget": 1 << 20,
            "autotune": True,
            "compile_ahead": False,
        },
        mode="reduce-overhead",
    )
    assert options.debug == Path("out")
    assert options.disable == {"mlp"}
    assert options.mode == "reduce-overhead"
    assert options.memory_budget == 1 << 20
    assert options.autotune and not options.compile_ahead


def test_options_made_by_hand_are_validated_too():
    assert Options(disable="linear").disable == {"linear"}  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidOptionError, match="option 'strategy' cannot be 'fast'"):
        Options(strategy="fast")


def test_options_are_options():
    options = Options(strategy="streamed")
    assert Options.parse(options) is options
    assert Options.parse(options, mode="reduce-overhead") == Options(strategy="streamed", mode="reduce-overhead")


def test_a_mode_is_listed_once():
    with pytest.raises(InvalidOptionError) as raised:
        Options(mode="fastest")
    assert str(raised.value).count("'default'") == 1


def test_one_disabled_rule_may_be_given_as_a_word():
    assert Options.parse({"disable": "linear"}).disable == {"linear"}


def test_an_unknown_option_lists_the_known_ones():
    valid = "autotune, compile_ahead, debug, disable, inner"
    with pytest.raises(UnknownOptionError, match=f"unknown option 'strat'; valid options are: {valid}"):
        Options.parse({"strat": "fused"})


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"strategy": "fast"}, "'auto', 'fused', 'streamed', 'absorbed', 'merged', 'kept'"),
        ({"inner": "tvm"}, "'inductor', 'aot_eager', 'eager'"),
        ({"disable": ["attn"]}, "attention, mlp, linear"),
        ({"disable": [["mlp"]]}, "attention, mlp, linear"),
        ({"disable": [{}]}, "attention, mlp, linear"),
        ({"debug": 3}, "True, False or a directory"),
        ({"mode": "fastest"}, "'reduce-overhead'"),
        ({"strategy": np.array(["fused", "merged"])}, "'auto', 'fused', 'streamed'"),
        ({"memory_budget": -1}, "a positive integer number of bytes"),
        ({"memory_budget": 1e6}, "a positive integer number of bytes"),
        ({"memory_budget": 2**63}, r"9223372036854775808; valid: a positive integer number of bytes below 2\*\*63"),
        ({"memory_budget": True}, "a positive integer number of bytes"),
        ({"autotune": "yes"}, "True or False"),
        ({"autotune": 1}, "True or False"),
        ({"compile_ahead": None}, "True or False"),
        ({"debug": ""}, "True, False or a directory"),
        ({"debug": "a\0b"}, "True, False or a directory"),
        ({"debug": "~nobody-by-this-name/graphs"}, "True, False or a directory"),
        ({"mode": ["default"]}, "'reduce-overhead'"),
        ("streamed", "a dictionary of options by name"),
        ("", "a dictionary of options by name"),
        (0, "a dictionary of options by name"),
    ],
)
def test_an_invalid_value_lists_the_valid_ones(options, valid):
    with pytest.raises(InvalidOptionError, match=valid):
        Options.parse(options)


def test_a_debug_directory_may_be_at_home():
    assert Options(debug="~/graphs").debug == Path.home() / "graphs"  # pyright: ignore[reportArgumentType]


def test_the_largest_memory_budget_is_taken():
    assert Options.parse({"memory_budget": 2**63 - 1}).memory_budget == 2**63 - 1


def test_a_memory_budget_may_be_an_integer_of_numpy():
    budget = Options.parse({"memory_budget": np.int64(1 << 20)}).memory_budget
    assert budget == 1 << 20 and type(budget) is int


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/absent"])
def test_a_debug_directory_that_cannot_be_made(tmp_path: Path, where: str):
    (tmp_path / "file").write_text("")
    graph = torch.fx.symbolic_trace(nn.ReLU())
    options = {"debug": tmp_path / where, "inner": "eager"}
    with pytest.raises(InvalidOptionError, match=rf"'debug' cannot be '.*{where}'; valid: True, False or a directory"):
        flashsvd(graph, [torch.randn(2)], options=options)


@pytest.mark.parametrize(
    "error",
    [
        UnknownOptionError("strat", ["strategy"]),
        InvalidOptionError("strategy", "fast", "'auto'"),
        ShapeError("x", (1,), (2,)),
        TwiceDifferentiatedError("mlp"),
    ],
)
def test_errors_pass_between_processes(error: FlashSVDError):
    error.add_note("in a worker")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.__notes__ == ["in a worker"]


def test_errors_can_be_caught_as_value_errors_and_as_ours():
    assert issubclass(UnknownOptionError, ValueError)
    assert issubclass(InvalidOptionError, FlashSVDError)


def test_a_mistake_surfaces_when_the_model_is_compiled():
    compiled = torch.compile(nn.Linear(4, 4), backend=flashsvd, options={"innner": "eager"})
    with pytest.raises(Exception, match="unknown option 'innner'"):
        compiled(torch.randn(2, 4))
