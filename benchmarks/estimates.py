"""The table of docs/scaling.md: peak memory of one GPU by model size and by how a run is divided, as estimated.

python -m benchmarks.estimates            # all rows, as Markdown
python -m benchmarks.estimates smollm2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES
from pivotune.config.settings import LoraSettings, RunConfig
from pivotune.config.yaml_text import parse_config
from pivotune.estimate.estimate import Estimate, Target, estimate_strategies
from pivotune.estimate.rows import RunRows, read_rows
from pivotune.training.distributed.strategies import Strategy

_LLAMA = SHAPES["llama2-7b"]
# Depth and widths as published; LLaMA-2-70B shares keys among eight groups of heads.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("SmolLM2-135M", SHAPES["smollm2"]),
    "gemma2-2b": ("Gemma-2-2B", SHAPES["gemma2-2b"]),
    "llama2-7b": ("LLaMA-2-7B", _LLAMA),
    "llama2-13b": (
        "LLaMA-2-13B",
        {**_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
         "num_key_value_heads": 40},
    ),
    "llama2-70b": (
        "LLaMA-2-70B",
        {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8},
    ),
}  # fmt: skip
DIVIDED: tuple[tuple[Strategy, int], ...] = (
    ("single", 1),
    ("ddp", 8),
    ("fsdp2", 8),
    ("zero2", 8),
    ("zero3", 8),
    ("fsdp2", 64),
)
TRAINING = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "bf16": True,
    "optim": "adamw_torch_fused",
}


def full_rows(config: RunConfig) -> RunRows:
    """A micro-batch of rows at the limits: 256 tokens of prompt and of answer, in both languages."""
    rows = read_rows(config, rows=1000)
    return dataclasses.replace(rows, examples=[max(rows.examples, key=lambda row: len(row.main.ids))] * 8)


def gibibytes(estimate: Estimate) -> str:
    return f"{estimate.memory.peak / 2**30:,.1f}"


def table_row(name: str) -> str:
    title, shape = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
        settings = {"model": folder, "data": {"train": "rows.jsonl"}, "output_dir": "run", "training": TRAINING}
        config = parse_config(settings)
        rows = full_rows(config)
        targets = [Target(device="cuda", processes=count, strategy=strategy) for strategy, count in DIVIDED]
        full = estimate_strategies(config, targets, rows)
        adapters = [
            estimate_strategies(config.model_copy(update=changes), targets[:1], rows)[0]
            for lora in [LoraSettings.model_validate({"r": 16})]
            for changes in ({"lora": lora}, {"lora": lora, "quantize": "4bit"})
        ]
    billions = f"{full[0].size.total / 1e9:.3g} B"
    return f"| {' | '.join([title, billions, *map(gibibytes, [*full, *adapters])])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {list(MODELS)}; default: all")
    names = parser.parse_args().models or list(MODELS)
    if unknown := set(names) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    for name in names:
        print(table_row(name), flush=True)


if __name__ == "__main__":
    main()
