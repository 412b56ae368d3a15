"""The model card of a run: `README.md`, with what was trained on what, how, and what came out."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import dump_config
from pivotune.text.escaping import markdown, printable
from pivotune.text.redaction import redact


def model_card(config: RunConfig, layers: Any, results: dict[str, Any]) -> str:
    """Markdown with the Hub's metadata block."""
    language = config.data.language or "the target language"
    settings = dump_config(config)
    parts = [
        _metadata(config),
        f"# {_text(config.model)} fine-tuned for {_text(language)}\n\n{METHODS[config.method].summary}",
        _layers_text(layers),
        _results_table(results),
        "## How to use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("model")\ntokenizer = AutoTokenizer.from_pretrained("model")\n```',
        f"## Configuration\n\n{_fence(settings)}yaml\n{printable(settings)}{_fence(settings)}",
        "Made with Pivotune. `metrics.jsonl` holds every logged step, `environment.json` the versions.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(config: RunConfig) -> str:
    languages = [code for code in (config.data.language, "en") if code]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": languages,
    }
    # The Hub takes names of its own models only.
    if not config.model.startswith("bundled:") and not Path(config.model).exists():
        metadata["base_model"] = redact(config.model)
    metadata["tags"] = ["pivotune", config.method]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _layers_text(layers: Any) -> str:
    if layers is None:
        return ""
    return (
        f"## Layers\n\nConversion at layer {layers['conversion']}, thinking at layer {layers['thinking']} of "
        f"{layers['num_layers']} ({_text(layers['reason'])})."
    )


def _results_table(results: dict[str, Any]) -> str:
    rows = [
        f"| {_text(name)} | {task['n']} | {task['base']['value']:.3f} | {task['value']:.3f}{_spread(task['stderr'])} | "
        f"{task['base']['nll_per_character']:.3f} | {task['nll_per_character']:.3f} |"
        for name, task in results["tasks"].items()
        if "base" in task
    ]
    if not rows:
        return ""
    titles = ("held-out rows", "n", "NLL per token before", "after", "NLL per character before", "after")
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    return "\n".join(
        ["## Results\n\nNegative log-likelihood of the gold answer in nats; lower is better.\n", head, *rows]
    )


def _spread(stderr: float) -> str:
    """Nothing for a single row, which has no standard error."""
    return f" ± {stderr:.3f}" if math.isfinite(stderr) else ""


def _text(name: str) -> str:
    """A name from the configuration as one line of plain text: no markup, no HTML, no secret."""
    return markdown(redact(name))


def _fence(text: str) -> str:
    """Backticks that the text does not hold."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
