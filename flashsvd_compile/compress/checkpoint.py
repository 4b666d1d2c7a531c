"""Factored checkpoints: one safetensors file, with the shape of every low-rank layer in its metadata."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ..errors import CheckpointError, shown
from .dense_layer import ModelT, dense_layers, replaced, uncompiled, why_not_copied
from .low_rank_linear import LowRankLinear

FORMAT = "flashsvd-factored-1"
LAYERS_KEY = "flashsvd_layers"
EXAMPLE = {"in_features": 768, "rank": 192, "out_features": 768, "down_bias": False, "bias": True}
"""What the metadata says of a layer."""
FLOATING = ("F", "BF")
"""How safetensors begins the names of floating dtypes."""


def save_factored(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a model's state dict as safetensors; parameters that are shared are written once.

    Args:
        model: holds at least one :class:`LowRankLinear`; a compiled model is saved as the model that was compiled.
        path: of the file to write.

    Raises:
        CheckpointError: no module, or one without a low-rank layer or with weights on the meta device, or the file
            cannot be written.
    """
    _check_path(path)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the model must be an nn.Module, not {shown(model)}")
    model = uncompiled(model)
    layers = {name: _describe(module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers:
        raise CheckpointError("the model has no low-rank layer; compress it first")
    empty = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if empty is not None:
        raise CheckpointError(f"{empty!r} has no numbers: it is on the meta device")
    try:
        save_model(model, str(path), metadata={"format": FORMAT, LAYERS_KEY: json.dumps(layers)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def load_factored(model: ModelT, path: str | PathLike[str]) -> ModelT:
    """A copy of a dense model with the low-rank layers and all weights of a factored checkpoint.

    Args:
        model: the dense architecture, such as ``AutoModel.from_config(config)``; its weights do not matter, its
            dtypes and devices are those of the result. Weights on the meta device come to the CPU. Of a compiled model,
            that which was compiled is copied.
        path: of a file that :func:`save_factored` wrote.

    Raises:
        CheckpointError: not a factored checkpoint, one of another architecture or of integers, a model that cannot be
            copied, or a buffer on the meta device that no checkpoint holds; the message names the layer or buffer.
    """
    _check_path(path)
    model = uncompiled(model)
    if (obstacle := why_not_copied(model)) is not None:
        raise CheckpointError(obstacle)
    dense = dict(dense_layers(model))
    low_rank: dict[str, LowRankLinear] = {}
    for name, shape in _read_layers(path).items():
        if name not in dense:
            if isinstance(dict(model.named_modules()).get(name), LowRankLinear):
                raise CheckpointError(f"{path}: layer {name!r} of the model is low-rank already; give the dense model")
            raise CheckpointError(f"{path}: the model has no dense layer {name!r}")
        try:
            low_rank[name] = dense[name].low_rank(shape["rank"], shape["down_bias"])
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path}: no layer {name!r} of rank {shape['rank']} can be made: {error}") from error
        if _describe(low_rank[name]) != shape:
            raise CheckpointError(f"{path}: layer {name!r} is {shape}, in the model {_describe(low_rank[name])}")
    try:
        factored = replaced(model, low_rank, tensors=_storage_for_meta(model))
    except TypeError as error:
        raise CheckpointError(f"{type(model).__name__} cannot be copied: {error}") from error
    try:
        load_model(factored, str(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    return factored


def _storage_for_meta(model: nn.Module) -> dict[int, Tensor]:
    """Empty tensors on the CPU for those on the meta device, by the identity of the latter."""
    saved = model.state_dict().keys()
    storage: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and name not in saved:
            raise CheckpointError(
                f"buffer {name!r} is on the meta device, and no checkpoint holds its values; make the model elsewhere"
            )
        if tensor.is_meta:
            empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
            is_parameter = isinstance(tensor, nn.Parameter)
            storage[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return storage


def _check_path(path: object) -> None:
    if not isinstance(path, (str, PathLike)):
        raise CheckpointError(f"the path of a checkpoint must be a string or a PathLike, not {shown(path)}")


def _describe(layer: LowRankLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "rank": layer.rank,
        "out_features": layer.out_features,
        "down_bias": layer.down.bias is not None,
        "bias": layer.bias is not None,
    }


def _read_layers(path: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """The description of every low-rank layer, from the file's metadata."""
    if Path(path).is_dir():
        raise CheckpointError(
            f"cannot read {path}: it is a folder; give the file (`flashsvd compress` writes factored.safetensors)"
        )
    try:
        Path(path).open("rb").close()  # safetensors says of a file that may not be read that there is none
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a factored checkpoint of format {FORMAT}; save_factored writes those")
    try:
        layers = json.loads(metadata.get(LAYERS_KEY, ""))
    except ValueError as error:
        raise CheckpointError(f"{path}: {LAYERS_KEY} of its metadata is not JSON: {error}") from error
    if not isinstance(layers, dict):
        raise CheckpointError(f"{path}: {LAYERS_KEY} of its metadata is {layers!r}, expected layers by name")
    for name, shape in layers.items():
        if not _is_description(shape):
            raise CheckpointError(f"{path}: layer {name!r} is {shape!r}, expected a shape such as {EXAMPLE}")
        for factor in {f"{name}.down.weight", f"{name}.up.weight"} & dtypes.keys():
            if not dtypes[factor].startswith(FLOATING):
                raise CheckpointError(f"{path}: {factor!r} is {dtypes[factor]}, expected numbers in floating point")
    return layers


def _is_description(shape: object) -> bool:
    return (
        isinstance(shape, dict)
        and {key: type(value) for key, value in shape.items()} == {key: type(value) for key, value in EXAMPLE.items()}
        and shape["rank"] > 0
    )
