"""Other libraries measured beside ours; each is left out where it is not installed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


def trl_trainer(model: Any, settings: Mapping[str, Any]) -> Any | None:
    """TRL's SFTTrainer, whose head is fused with its loss, on a copy of the model: it takes the head apart.

    Args:
        settings: as for `transformers.TrainingArguments`. Activation checkpointing, TRL's default, is off as elsewhere.
    """
    if find_spec("trl") is None:
        return None
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]]})
    return SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(**{**settings, "gradient_checkpointing": False}),
        train_dataset=rows,
        processing_class=_some_tokenizer(),
    )


def _some_tokenizer() -> Any:
    """SFTTrainer asks for one; rows that are encoded already do not use it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
