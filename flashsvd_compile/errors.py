"""One exception class per mistake a user can make.

Every message names the value that was given and what would have been valid.
"""

from collections.abc import Iterable
from typing import Any

LONGEST = 80
"""Characters of a value that a message repeats."""


class FlashSVDError(Exception):
    """Base class of all errors raised on purpose by this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        """By the message, so that it passes between processes: a subclass takes what the message is made of."""
        return _with_message, (type(self), str(self)), self.__dict__ or None


def _with_message(error: type[FlashSVDError], message: str) -> FlashSVDError:
    return error.__new__(error, message)


def shown(value: object) -> str:
    """A value as a message gives it: its type alone where it is long, as a model or a tensor is."""
    text = repr(value)
    return text if len(text) <= LONGEST and "\n" not in text else f"an object of type {type(value).__name__}"


class UnknownOptionError(FlashSVDError, ValueError):
    """An option key the backend does not know."""

    def __init__(self, key: str, valid: Iterable[str]):
        super().__init__(f"unknown option {key!r}; valid options are: {', '.join(sorted(valid))}")


class InvalidOptionError(FlashSVDError, ValueError):
    """A known option with a value it cannot take."""

    def __init__(self, key: str, value: object, valid: str):
        got = repr(value) if isinstance(value, str) else shown(value)  # of a path, all of it
        super().__init__(f"option {key!r} cannot be {got}; valid: {valid}")


class GraphError(FlashSVDError, ValueError):
    """What is to be rewritten is not a graph that says of its nodes what they compute."""

    def __init__(self, got: str, why: str):
        super().__init__(f"{got} {why}; give a graph by Dynamo, or the graph_module of a program by torch.export")


class ModelError(FlashSVDError, TypeError):
    """What is to be traced cannot be called."""

    def __init__(self, got: object):
        super().__init__(f"the model must be a module or a function, not {shown(got)}")


class ShapeError(FlashSVDError, ValueError):
    """Tensors given to an operator do not fit together."""

    def __init__(self, what: str, got: object, expected: object):
        super().__init__(f"{what} is {got}, expected {expected}")


class DtypeError(FlashSVDError, TypeError):
    """A tensor has a dtype the operator cannot compute in."""

    def __init__(self, what: str, got: object, expected: object):
        super().__init__(f"{what} has dtype {got}, expected {expected}")


class TwiceDifferentiatedError(FlashSVDError, NotImplementedError):
    """A gradient of an operator's gradient, which is recomputed and has none."""

    def __init__(self, operator: str):
        super().__init__(f"{operator} is differentiable once; use the eager model with create_graph=True")


class CompressionError(FlashSVDError, ValueError):
    """A model cannot be compressed as asked."""


class CheckpointError(FlashSVDError, ValueError):
    """A factored checkpoint cannot be read or written."""
