"""The options of the backend: parsed once, validated, immutable."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from numbers import Integral
from pathlib import Path
from typing import Any

from .errors import InvalidOptionError, UnknownOptionError


class Strategy(StrEnum):
    """How a matched region is computed. See docs/strategies.md."""

    FUSED = "fused"
    STREAMED = "streamed"
    ABSORBED = "absorbed"
    MERGED = "merged"
    KEPT = "kept"


AUTO = "auto"
PACKING = "packing"
RESIDUAL = "residual"
INPUT_NORM = "input_norm"
RULES = ("attention", "mlp", "linear", PACKING, RESIDUAL, INPUT_NORM)
INNER_BACKENDS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="flashsvd", options=...)``, validated when they are made.

    Attributes:
        debug: print the report and the graph before and after; a directory path writes them there instead. Reasons in
            the report then say what else the planner considered.
        strategy: ``"auto"`` lets the planner choose; a :class:`Strategy` forces one where it applies.
        disable: names of rules that must not run (see ``RULES``).
        inner: backend that compiles the rewritten graph.
        mode: a mode of ``torch.compile`` for the inner Inductor. ``torch.compile`` forbids ``mode=`` next to
            ``options=``, hence this key.
        memory_budget: upper bound, in bytes, for an operator's own workspace. ``None`` lets the planner choose.
        autotune: on a GPU, time the tiles of each kind of kernel launch once and keep the fastest on disk.
        compile_ahead: on a GPU, compile the operators' kernels in threads while Inductor compiles the rest.

    Raises:
        InvalidOptionError: a value that the option cannot take.
    """

    debug: bool | Path = False
    strategy: str = AUTO
    disable: frozenset[str] = frozenset()
    inner: str = "inductor"
    mode: str | None = None
    memory_budget: int | None = None
    autotune: bool = False
    compile_ahead: bool = True

    def __post_init__(self):
        for key, check in _CHECKS.items():
            object.__setattr__(self, key, check(getattr(self, key)))

    @classmethod
    def parse(cls, raw: "Options | Mapping[str, Any] | None" = None, mode: str | None = None) -> "Options":
        """The options by name, as ``torch.compile`` is given them; ``mode`` beside them replaces theirs.

        Raises:
            UnknownOptionError: a key that is no option.
            InvalidOptionError: a value that the option cannot take.
        """
        if isinstance(raw, Options):
            return raw if mode is None else replace(raw, mode=mode)
        if raw is not None and not isinstance(raw, Mapping):
            raise InvalidOptionError("options", raw, "a dictionary of options by name, or None")
        raw = dict(raw or {})
        valid_keys = {field.name for field in fields(cls)}
        for key in raw:
            if key not in valid_keys:
                raise UnknownOptionError(key, valid_keys)
        if mode is not None:
            raw["mode"] = mode
        return cls(**raw)


def _debug(value: Any) -> bool | Path:
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)) and str(value) and "\0" not in str(value):
        with suppress(RuntimeError):  # a user who has no home
            return Path(value).expanduser()
    raise InvalidOptionError("debug", value, "True, False or a directory")


def _one_of(key: str, valid: tuple[str, ...]):
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in valid:
            raise InvalidOptionError(key, value, ", ".join(map(repr, valid)))
        return str(value)

    return check


def _disable(value: Any) -> frozenset[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) and name in RULES for name in names
    ):
        raise InvalidOptionError("disable", value, f"a list of rule names out of {', '.join(RULES)}")
    return frozenset(names)


def _mode(value: Any) -> str | None:
    if value is None:
        return None
    from torch._inductor import list_mode_options  # here: it loads all of Inductor

    valid = tuple(dict.fromkeys(("default", *list_mode_options())))
    if not isinstance(value, str) or value not in valid:
        raise InvalidOptionError("mode", value, ", ".join(map(repr, valid)))
    return None if value == "default" else value


def _memory_budget(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 < int(value) < 2**63:
        return int(value)
    raise InvalidOptionError("memory_budget", value, "a positive integer number of bytes below 2**63, or None")


def _switch(key: str):
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidOptionError(key, value, "True or False")
        return value

    return check


_CHECKS = {
    "debug": _debug,
    "strategy": _one_of("strategy", (AUTO, *map(str, Strategy))),
    "disable": _disable,
    "inner": _one_of("inner", INNER_BACKENDS),
    "mode": _mode,
    "memory_budget": _memory_budget,
    "autotune": _switch("autotune"),
    "compile_ahead": _switch("compile_ahead"),
}
