"""Models on disk: folders as transformers writes them, with dense or with factored weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import load_factored, save_factored
from ..errors import CheckpointError

FACTORED_WEIGHTS = "factored.safetensors"


def load(folder: Path) -> nn.Module:
    """The model of a folder, in evaluation mode on the CPU; nothing is downloaded.

    Args:
        folder: holds ``config.json`` and either :data:`FACTORED_WEIGHTS` or weights that transformers loads.

    Raises:
        CheckpointError: no such folder, no configuration or weights that transformers can load, or weights that do not
            fit the configuration.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no config.json")
    factored = (folder / FACTORED_WEIGHTS).exists()
    try:
        model = _from_transformers(folder, with_weights=not factored)
    except Exception as error:  # of any class: a configuration may be wrong in many ways, each with an error of its own
        raise CheckpointError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    return load_factored(model, folder / FACTORED_WEIGHTS) if factored else model


def _from_transformers(folder: Path, with_weights: bool) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    if with_weights:
        return architecture.from_pretrained(folder, local_files_only=True).eval()
    make = getattr(architecture, "_from_config", None) or architecture.from_config
    return make(config).eval()


def create(folder: Path, source: Path) -> None:
    """Make the folder for a factored model, unless it is there.

    Raises:
        CheckpointError: it cannot be made, or is the folder ``source`` of the dense model.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} is no folder that can be made: {error}") from error
    if folder.samefile(source):
        raise CheckpointError(f"{folder} holds the dense model; write the factored one to another folder")


def save(model: nn.Module, folder: Path, source: Path) -> None:
    """Write a factored model; configuration and tokenizer are copied from the folder that it was loaded from.

    Raises:
        CheckpointError: a file cannot be written.
    """
    try:
        for file in source.iterdir():
            if file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
    except OSError as error:
        raise CheckpointError(f"cannot copy the configuration to {folder}: {error}") from error
    save_factored(model, folder / FACTORED_WEIGHTS)


def sample_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs: token ids of a text model, ``[batch, length]``, or pixels of a vision model."""
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.rand(batch, config.num_channels, height, width)}
    ids = torch.randint(config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
