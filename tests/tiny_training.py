"""Small training runs: encoded rows, arguments and trainers for tiny models, and saved models and data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli_runs import RAW
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows
from tiny_batches import make_side
from torch import Tensor, nn

from pivotune.config.settings import EncodingConfig, FaultsConfig, RunConfig, merged
from pivotune.config.supervision import FeatureConfig, LogitsConfig, SignalConfig
from pivotune.config.yaml_text import parse_config
from pivotune.data.examples import Pair
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.trainer import DeepSupervisionTrainer

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}


def make_pairs(count: int, *, seed: int = 0) -> list[Pair]:
    """Rows of random tokens, with different lengths in every part of both sides."""
    random = np.random.default_rng(seed)

    def side() -> Any:
        return make_side(random, *(int(random.integers(1, most)) for most in (3, 6, 3, 7)))

    return [Pair(target=side(), english=side(), number=index + 1) for index in range(count)]


def arguments(folder: Path, **changes: Any) -> DeepSupervisionConfig:
    """One pass over the rows in batches of 4, every step logged, nothing saved."""
    settings = {
        **QUIET,
        "output_dir": str(folder),
        "conversion_layer": 1,
        "thinking_layer": 3,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **changes,
        "supervision": merged(RAW, changes.get("supervision") or {}),
    }
    return DeepSupervisionConfig(**nested(settings))


# Short names of keys in tests -> their place in the sections.
SHORT_NAMES = {
    **{
        f"{term}_{key}": f"supervision.{term}.{key}"
        for term in ("conversion", "thinking")
        for key in SignalConfig.model_fields
    },
    "supervision_schedule": "supervision.schedule",
    "profile_rows": "supervision.profile_rows",
    **{f"logits_{key}": f"supervision.logits.{key}" for key in LogitsConfig.model_fields},
    **{f"feature_{key}": f"supervision.feature.{key}" for key in FeatureConfig.model_fields},
    **{key: f"data.{key}" for key in EncodingConfig.model_fields},
    **{key: f"faults.{key}" for key in FaultsConfig.model_fields},
}


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Move short names (`thinking_layer=20`) into their sections."""
    sections = {key: value for key, value in settings.items() if key not in SHORT_NAMES}
    for key in settings.keys() & SHORT_NAMES.keys():
        section, *path = SHORT_NAMES[key].split(".")
        given = {path[-1]: settings[key]}
        sections[section] = merged(sections.get(section) or {}, {path[0]: given} if len(path) > 1 else given)
    return sections


def tiny_trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    rows: Any = None,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> DeepSupervisionTrainer:
    """A trainer of a tiny Llama on 16 rows; `changes` are arguments, `trainer` what else its constructor takes."""
    return DeepSupervisionTrainer(
        build_tiny_model() if model is None else model,
        arguments(folder, **changes),
        train_dataset=make_pairs(16) if rows is None else rows,
        processing_class=build_tiny_tokenizer(),
        **(trainer or {}),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal tensors under equal names; bit for bit without a tolerance."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def step_logs(trainer: DeepSupervisionTrainer) -> list[dict[str, Any]]:
    """The log lines of training steps without what depends on the clock, or on one micro-batch (gradient figures)."""
    return [
        {name: value for name, value in line.items() if not name.endswith(("per_second", "gradient_share", "cosine"))}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def save_tiny_model(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """A model folder with a tokenizer whose special tokens the configuration knows; returns its name."""
    tokenizer = build_tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    build_tiny_model(family, **{**ids, **changes}).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, str]] | int) -> str:
    rows = tiny_rows(rows) if isinstance(rows, int) else rows
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short run of a saved tiny model on 20 rows, 4 of them held out; made in `folder` if not there."""
    if not (folder / "base").exists():
        save_tiny_model(folder / "base")
        write_rows(folder / "rows.jsonl", 20)
    return {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl"), "validation": 4, "language": "sw"},
        "training": {
            **QUIET,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
        },
        "output_dir": str(folder / "run"),
        **changes,
        "supervision": merged({**RAW, "profile_rows": 8}, changes.get("supervision") or {}),
    }


def run_config(folder: Path, **changes: Any) -> RunConfig:
    return parse_config(run_settings(folder, **changes))
