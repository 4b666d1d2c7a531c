"""Models on disk: folders as transformers writes them, with dense or with factored weights."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from typer import BadParameter

from ..compress import DEFAULT_SKIP, load_factored, save_factored
from ..compress.dense_layer import dense_layers
from ..compress.factorise import fits_any
from ..errors import CheckpointError
from .extras import extra

CONFIGURATION = "config.json"
FACTORED_WEIGHTS = "factored.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot")
"""Endings of files with weights, in all the formats that model folders come with."""
NAMED = 4
"""Missing weights that an error message names."""


def load(folder: Path) -> nn.Module:
    """The model of a folder, in evaluation mode on the CPU; nothing is downloaded.

    Args:
        folder: holds ``config.json`` and either :data:`FACTORED_WEIGHTS` or weights that transformers loads.

    Raises:
        CheckpointError: no such folder, no configuration or weights that transformers can load, or weights that do not
            fit the configuration or lack those of a layer that is to be factored.
    """
    if not folder.exists():
        raise CheckpointError(f"there is no folder {folder}; models are read from disk, nothing is downloaded")
    if not (folder / CONFIGURATION).is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIGURATION}")
    factored = is_factored(folder)
    try:
        model = _from_transformers(folder, with_weights=not factored)
    except BadParameter:  # transformers itself is missing
        raise
    except Exception as error:  # of any class: a configuration may be wrong in many ways, each with an error of its own
        raise CheckpointError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    return load_factored(model, folder / FACTORED_WEIGHTS) if factored else model


def is_factored(folder: Path) -> bool:
    """Whether a folder's weights are factored, as ``flashsvd compress`` writes them."""
    return (folder / FACTORED_WEIGHTS).exists()


def _from_transformers(folder: Path, with_weights: bool) -> nn.Module:
    with extra("bench"):
        import transformers
        from transformers.utils import logging

    logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["AutoModel"])[0]
    named = getattr(transformers, name, transformers.AutoModel)
    if not isinstance(named, type) or not (issubclass(named, nn.Module) or hasattr(named, "from_config")):
        raise ValueError(f"its architecture {name!r} is not a model")
    architecture: Any = named
    if with_weights:
        model, info = architecture.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        _refuse_without(model, info["missing_keys"], info["unexpected_keys"])
        return model.eval()
    if config.dtype is None:  # which a dense model's weights decide then
        config.dtype = _dtype_of(folder / FACTORED_WEIGHTS)
    make = getattr(architecture, "_from_config", None) or architecture.from_config
    return make(config).eval()


def _refuse_without(model: nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a model whose layers would be factored from random weights, which transformers gives them."""
    factored = [name for name, _ in dense_layers(model) if not fits_any(name, DEFAULT_SKIP)]
    absent = sorted(set(missing) & {f"{name}.{each}" for name in factored for each in ("weight", "bias")})
    if absent:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        are_factors = not {f"{name}.down.weight" for name in factored}.isdisjoint(unexpected)
        hint = f"; they are factors, which save_factored writes to {FACTORED_WEIGHTS}" if are_factors else ""
        raise ValueError(f"the weights lack {', '.join(absent[:NAMED])}{more}{hint}")


def _dtype_of(weights: Path) -> torch.dtype | None:
    """The dtype of the first floating tensor of a file."""
    with safe_open(str(weights), framework="pt") as file:
        tensors = (file.get_tensor(key) for key in file.keys())  # noqa: SIM118
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


@contextmanager
def made(folder: Path, source: Path) -> Iterator[None]:
    """A folder for a factored model: made unless it is there, and gone again if what is to fill it fails.

    Raises:
        CheckpointError: it cannot be made, is the folder ``source`` of the dense model, or holds other weights.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [file.name for file in folder.iterdir() if _is_of_weights(file) and file.name != FACTORED_WEIGHTS]
        if is_factored(folder) and _differs(folder / CONFIGURATION, source / CONFIGURATION):
            others.append(CONFIGURATION)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made a folder: {error}") from error
    if folder.samefile(source):
        raise CheckpointError(f"{folder} holds the dense model; write the factored one to another folder")
    if others:
        raise CheckpointError(f"{folder} holds another model ({others[0]}); write the factored one to another folder")
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def save(model: nn.Module, folder: Path, source: Path) -> None:
    """Write a factored model; all but the weights is copied from the folder that it was loaded from.

    Raises:
        CheckpointError: a file cannot be written.
    """
    try:
        for entry in _beside_the_weights(source):
            if folder.resolve().is_relative_to(entry.resolve()):
                continue
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name, dirs_exist_ok=True)
            else:
                shutil.copy(entry, folder)
    except OSError as error:
        raise CheckpointError(f"cannot copy the configuration to {folder}: {error}") from error
    save_factored(model, folder / FACTORED_WEIGHTS)


def _beside_the_weights(folder: Path) -> Iterator[Path]:
    """A model's configuration, tokenizer, templates and code.

    What is hidden is no part of the model, and a folder with weights in it is a model of its own.
    """
    for entry in sorted(folder.iterdir()):
        hidden = entry.name.startswith(".") or entry.name == "__pycache__"
        if not hidden and not any(_is_of_weights(file) for file in (entry, *entry.rglob("*"))):
            yield entry


def _differs(file: Path, other: Path) -> bool:
    return file.exists() and file.read_bytes() != other.read_bytes()


def _is_of_weights(file: Path) -> bool:
    return file.suffix in WEIGHTS or file.name.endswith(".index.json")
