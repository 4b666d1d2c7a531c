"""Random inputs that a model from disk can run."""

from typing import Any

import torch
import typer
from torch import Tensor, nn


def sample_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs of the shape that the model's configuration states; the model has run the first sample of them.

    Args:
        batch: texts, pictures or recordings.
        length: tokens of each text, for a model of waveforms also frames of each recording.

    Raises:
        typer.BadParameter: the model takes another kind of input, its configuration lacks a size, or it cannot run
            inputs of this length.
    """
    inputs = _random_inputs(model, batch, length)
    _run_first_sample(model, inputs, length)
    return inputs


def _random_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    name, dtype = type(model).__name__, getattr(model, "dtype", torch.float32)
    try:
        if main == "input_ids":
            ids = _token_ids(config, batch, length)
            inputs = {main: ids, "attention_mask": torch.ones_like(ids)}
            inputs |= {"pixel_values": _pixels(config, batch).to(dtype)} if _pairs_pictures_with_texts(config) else {}
        elif main == "pixel_values":
            inputs = {main: _pixels(config, batch).to(dtype)}
            inputs |= {"input_ids": _token_ids(config, batch, length)} if _pairs_pictures_with_texts(config) else {}
        elif main == "input_features":
            inputs = {main: torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)}
        elif main == "input_values":
            inputs = {main: torch.randn(batch, _waveform_samples(config, length), dtype=dtype)}
        else:
            valid = "input_ids, pixel_values, input_features or input_values"
            raise typer.BadParameter(f"no inputs can be made for {name}: its main input is {main!r}, not {valid}")
        return inputs | ({"decoder_input_ids": _token_ids(config, batch, length)} if config.is_encoder_decoder else {})
    except (AttributeError, TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"no {main} can be made for {name}; its configuration lacks a size: {error}"
        ) from error


def _token_ids(config: Any, batch: int, length: int) -> Tensor:
    return torch.randint(config.get_text_config().vocab_size, (batch, length))


def _pixels(config: Any, batch: int) -> Tensor:
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(batch, vision.num_channels, height, width)


def _pairs_pictures_with_texts(config: Any) -> bool:
    """Both are needed, as by CLIP; where a token stands for a picture, a text may do without."""
    image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    return image_token is None and hasattr(config, "vision_config") and hasattr(config, "text_config")


def _waveform_samples(config: Any, frames: int) -> int:
    """The samples from which the convolutions of wav2vec 2.0 make this many frames."""
    samples = frames
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def _run_first_sample(model: nn.Module, inputs: dict[str, Tensor], length: int) -> None:
    try:
        with torch.no_grad():
            model(**{name: value[:1] for name, value in inputs.items()})
    except Exception as error:  # of any class: each model has its own way to refuse an input
        config: Any = model.config.get_text_config()  # pyright: ignore
        stated = [
            f"; its configuration states {name} {getattr(config, name)}"
            for name in ("max_position_embeddings", "max_target_positions")
            if hasattr(config, name)
        ]
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise typer.BadParameter(
            f"{type(model).__name__} cannot run --length {length} ({shapes}): {type(error).__name__}: {error}"
            + "".join(stated)
        ) from error
