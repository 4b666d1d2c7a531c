"""Small factored models, compiled with every graph's report kept, and the rule that their outputs must obey."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import flashsvd_compile as fsvd
from benchmarks.zoo import FAMILIES, Inputs, make
from flashsvd_compile.backend import flashsvd
from flashsvd_compile.report import RewriteReport
from tests.ops.accuracy import FACTOR, relative_error


@cache
def factored(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The small model of a family with half of its projections' parameters."""
    return fsvd.compress(make(FAMILIES[name]), keep_ratio=0.5).to(dtype)


@cache
def in_float64(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights, rounded to ``dtype``, in double precision."""
    return copy.deepcopy(factored(name, dtype)).double()


class Compiled:
    """A model compiled by the backend.

    Attributes:
        reports: one for each graph that was compiled.
        graphs: those graphs, rewritten.
    """

    def __init__(self, model: Callable, inner: str = "eager", dynamic: bool | None = None):
        self.reports: list[RewriteReport] = []
        self.graphs: list[torch.fx.Graph] = []
        self._inner = inner
        self._call = torch.compile(model, backend=self.backend, dynamic=dynamic)

    def backend(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        """Compile a graph and keep its report."""
        compiled = flashsvd(module, inputs, options={"inner": self._inner})
        report = fsvd.last_report()
        assert report is not None
        self.reports.append(report)
        self.graphs.append(module.graph)
        return compiled

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        return self._call(*arguments, **inputs)

    @property
    def report(self) -> RewriteReport:
        """All graphs' reports in one."""
        return sum(self.reports[1:], self.reports[0])


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    members = output.values() if hasattr(output, "values") else output
    return [tensor for member in members for tensor in tensors(member)] if hasattr(members, "__iter__") else []


def assert_as_right_as_unfused(
    name: str, compiled: Callable, inputs: Inputs, dtype: torch.dtype = torch.float32
) -> None:
    """The outputs err at most 1.25 times as much as the unfused model's, both against float64.

    Such small models err by two or three units of their dtype's resolution, and by luck once by one: two are allowed.
    """
    wide = {key: value.double() if _is_floating(value) else value for key, value in inputs.items()}
    exact = tensors(in_float64(name, dtype)(**wide))
    unfused, actual = tensors(factored(name, dtype)(**inputs)), tensors(compiled(**inputs))
    described = [[(tensor.shape, tensor.dtype) for tensor in outputs] for outputs in (actual, unfused)]
    assert described[0] == described[1] != []
    assert unfused[0].dtype == dtype
    allowed = max(FACTOR * _error(unfused, exact), 2 * torch.finfo(dtype).eps)
    error = _error(actual, exact)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"


def _error(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """Of all outputs together: a pooled output alone has too few numbers to tell luck from error."""
    return relative_error(torch.cat([o.flatten() for o in outputs]), torch.cat([e.flatten() for e in exact]))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
