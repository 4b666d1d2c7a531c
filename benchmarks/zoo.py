"""Small models of many transformer families, built from transformers configs with random weights.

Two layers, 64 features, four heads: large enough that every part of a family's block is there, small enough to compile
in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 100
LAYERS = 2
PADDINGS = ("none", "right", "left")

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": VOCABULARY}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_TEXT, **_TOKENS, "num_key_value_heads": 2}
_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": VOCABULARY,
    **_TOKENS,
    "decoder_start_token_id": 1,
}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of transformers.

    Attributes:
        build: makes the small model; call :func:`make` for one with weights that matter.
        inputs: keyword arguments of its forward, from batch size, length and one of :data:`PADDINGS`.
        attentions, mlps: regions in the model's forward.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, str], Inputs]
    attentions: int = LAYERS
    mlps: int = LAYERS


def make(family: Family, seed: int = 0) -> nn.Module:
    """The small model in evaluation mode.

    Weights are drawn so that scores and activations are of order one: with the usual initialisation all scores are
    near zero, and a wrong mask or rotation would hardly show.
    """
    torch.manual_seed(seed)
    model = family.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.requires_grad_(False)


def attention_mask(batch: int, length: int, padding: str) -> Tensor:
    """``[batch, length]``, 1 for tokens; item ``i`` has ``2 i`` positions of padding, but at least one token."""
    positions = torch.arange(length)
    padded = (2 * torch.arange(batch)).clamp(max=length - 1)[:, None]
    if padding == "left":
        return (positions >= padded).long()
    return (positions < length - padded).long()


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def _encoder(batch: int, length: int, padding: str) -> Inputs:
    inputs = {"input_ids": _tokens(batch, length)}
    if padding != "none":
        inputs["attention_mask"] = attention_mask(batch, length, padding)
    return inputs


def _decoder(batch: int, length: int, padding: str) -> Inputs:
    return {**_encoder(batch, length, padding), "use_cache": False}


def _alibi_decoder(batch: int, length: int, padding: str) -> Inputs:
    """Never padded on the left: a bias added to the least number overflows where a query sees no key."""
    return _decoder(batch, length, "right" if padding == "left" else padding)


def _sequence_to_sequence(batch: int, length: int, padding: str) -> Inputs:
    return {**_decoder(batch, length, padding), "decoder_input_ids": _tokens(batch, max(1, length // 2))}


def _image(batch: int, length: int, padding: str) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _speech(batch: int, length: int, padding: str) -> Inputs:
    return {
        "input_features": torch.randn(batch, 8, 32),
        "decoder_input_ids": _tokens(batch, length),
        "use_cache": False,
    }


_VISION: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8}

FAMILIES = {
    family.name: family
    for family in (
        Family("BERT", lambda: tf.BertModel(tf.BertConfig(**_TEXT)), _encoder),
        Family("RoBERTa", lambda: tf.RobertaModel(tf.RobertaConfig(**_TEXT)), _encoder),
        Family(
            "DistilBERT",
            lambda: tf.DistilBertModel(
                tf.DistilBertConfig(dim=64, hidden_dim=128, n_layers=LAYERS, n_heads=4, vocab_size=VOCABULARY)
            ),
            _encoder,
        ),
        Family("ELECTRA", lambda: tf.ElectraModel(tf.ElectraConfig(**_TEXT, embedding_size=32)), _encoder),
        Family("ALBERT", lambda: tf.AlbertModel(tf.AlbertConfig(**_TEXT, embedding_size=32)), _encoder),
        Family(
            "ModernBERT",
            lambda: tf.ModernBertModel(
                tf.ModernBertConfig(
                    **_TEXT, **_TOKENS, cls_token_id=1, sep_token_id=2, local_attention=8,
                    layer_types=["full_attention", "sliding_attention"],
                )
            ),
            _encoder,
        ),
        Family("ViT", lambda: tf.ViTModel(tf.ViTConfig(**_VISION)), _image),
        Family("MPNet", lambda: tf.MPNetModel(tf.MPNetConfig(**_TEXT)), _encoder),
        Family(
            "Swin",
            lambda: tf.SwinModel(
                tf.SwinConfig(image_size=32, patch_size=4, embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=4)
            ),
            _image,
            attentions=3,
            mlps=3,
        ),
        Family("CLIP text", lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**_TEXT, **_TOKENS)), _encoder),
        Family("CLIP vision", lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_VISION)), _image),
        Family(
            "GPT-2",
            lambda: tf.GPT2Model(tf.GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, **_TOKENS)),
            _decoder,
        ),
        Family(
            "OPT",
            lambda: tf.OPTModel(
                tf.OPTConfig(
                    hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, ffn_dim=128,
                    vocab_size=VOCABULARY, word_embed_proj_dim=64, **_TOKENS,
                )
            ),
            _decoder,
        ),
        Family(
            "GPT-J",
            lambda: tf.GPTJModel(
                tf.GPTJConfig(n_embd=64, n_layer=LAYERS, n_head=4, rotary_dim=8, vocab_size=VOCABULARY)
            ),
            _decoder,
        ),
        Family(
            "BLOOM",
            lambda: tf.BloomModel(tf.BloomConfig(hidden_size=64, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY)),
            _alibi_decoder,
        ),
        Family("Cohere", lambda: tf.CohereModel(tf.CohereConfig(**_GROUPED)), _decoder),
        Family("GPT-NeoX", lambda: tf.GPTNeoXModel(tf.GPTNeoXConfig(**_TEXT, **_TOKENS)), _decoder),
        Family("Llama", lambda: tf.LlamaModel(tf.LlamaConfig(**_GROUPED)), _decoder),
        Family("Mistral", lambda: tf.MistralModel(tf.MistralConfig(**_GROUPED, sliding_window=4)), _decoder),
        Family("Qwen2", lambda: tf.Qwen2Model(tf.Qwen2Config(**_GROUPED)), _decoder),
        Family("Qwen3", lambda: tf.Qwen3Model(tf.Qwen3Config(**_GROUPED, head_dim=16)), _decoder),
        Family("OLMo 2", lambda: tf.Olmo2Model(tf.Olmo2Config(**_GROUPED)), _decoder),
        Family("Cohere, q/k norm", lambda: tf.CohereModel(tf.CohereConfig(**_GROUPED, use_qk_norm=True)), _decoder),
        Family("Persimmon", lambda: tf.PersimmonModel(tf.PersimmonConfig(**_TEXT, **_TOKENS)), _decoder),
        Family(
            "Gemma 2",
            lambda: tf.Gemma2Model(tf.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=4)),
            _decoder,
        ),
        Family(
            "Gemma 3",
            lambda: tf.Gemma3TextModel(tf.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=4)),
            _decoder,
        ),
        Family("StableLM", lambda: tf.StableLmModel(tf.StableLmConfig(**_GROUPED, qk_layernorm=True)), _decoder),
        Family("Phi-3", lambda: tf.Phi3Model(tf.Phi3Config(**_GROUPED)), _decoder),
        Family(
            "T5",
            lambda: tf.T5Model(
                tf.T5Config(
                    d_model=64, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=4, vocab_size=VOCABULARY, **_TOKENS
                )
            ),
            _sequence_to_sequence,
            attentions=3 * LAYERS,
            mlps=2 * LAYERS,
        ),
        Family(
            "UMT5",
            lambda: tf.UMT5Model(
                tf.UMT5Config(
                    d_model=64, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=4, vocab_size=VOCABULARY, **_TOKENS
                )
            ),
            _sequence_to_sequence,
            attentions=3 * LAYERS,
            mlps=2 * LAYERS,
        ),
        Family(
            "BART",
            lambda: tf.BartModel(tf.BartConfig(**_ENCODER_DECODER)),
            _sequence_to_sequence,
            attentions=3 * LAYERS,
            mlps=2 * LAYERS,
        ),
        Family(
            "Whisper",
            lambda: tf.WhisperModel(
                tf.WhisperConfig(**_ENCODER_DECODER, num_mel_bins=8, max_source_positions=16, max_target_positions=64)
            ),
            _speech,
            attentions=3 * LAYERS,
            mlps=2 * LAYERS,
        ),
    )
}  # fmt: skip
