"""Model card of a run, its `README.md`: model, data, method, layers, results and configuration."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import dump_config
from pivotune.results.metrics import ERRORS_OF_95
from pivotune.text.escaping import markdown, printable
from pivotune.text.redaction import redact

_EXAMPLE = """\
## How to use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(NAME)
tokenizer = AutoTokenizer.from_pretrained(NAME)
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""


def model_card(
    config: RunConfig, layers: Any, results: dict[str, Any], name: str = "model", *, figure: str = ""
) -> str:
    """Return the card as Markdown with the Hub's metadata block.

    Args:
        name: of the model in the example.
        figure: file name of a picture of the training beside the card; empty without one.
    """
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": [*config.data.languages, "en"],
    }
    # The Hub accepts names of its own models only.
    if not config.model.startswith("bundled:") and not Path(config.model).exists():
        metadata["base_model"] = redact(config.model)
    metadata["tags"] = ["pivotune", config.method]
    if scores := _hub_results(results):
        metadata["model-index"] = [{"name": name.rpartition("/")[2] or "model", "results": scores}]
    language = ", ".join(config.data.languages) or "the target language"
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {_text(config.model)} fine-tuned for {_text(language)}\n\n{METHODS[config.method].summary}",
    ]
    if METHODS[config.method].inner_losses:
        named = ", ".join(
            f"{name} at layer {term.layer if layers is None else layers[name]}"
            for name, term in config.supervision.active().items()
        )
        how = (
            ", as the configuration names them"
            if layers is None
            else f" of {layers['num_layers']} ({_text(layers['reason'])})"
        )
        parts.append(f"## Layers\n\n{named.capitalize()}{how}.")
    parts.append("\n\n".join(filter(None, ("## Data", _data_line(config), trained_line(results)))))
    parts += filter(None, (_results_table(results), _benchmark_table(results)))
    if figure:
        parts.append(f"![Loss terms and held-out likelihood over the steps of training]({figure})")
    settings = dump_config(config)
    # More backticks than the configuration has in a row.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
    parts += [
        _EXAMPLE.replace("NAME", json.dumps(name)),
        f"## Configuration\n\n{fence}yaml\n{printable(settings)}{fence}",
        "Made with Pivotune. `metrics.jsonl` holds every logged step, `environment.json` the versions.",
    ]
    return "\n\n".join(parts) + "\n"


def trained_line(results: dict[str, Any]) -> str:
    """Return the rows and tokens of the whole training; '' where they were not counted."""
    trained = results.get("trained")
    if not trained:
        return ""
    english = (
        f"; {trained['english_tokens']:,} tokens of English sides beside them" if trained["english_tokens"] else ""
    )
    return (
        f"{trained['rows']:,} rows in all epochs with {trained['tokens']:,} tokens, {trained['answer_tokens']:,} of them "
        f"in answers{english}."
    )


def _results_table(results: dict[str, Any]) -> str:
    rows = []
    for name, task in results["tasks"].items():
        if base := task.get("base"):
            # A single row has no standard error.
            spread = f" ± {task['stderr']:.3f}" if math.isfinite(task["stderr"]) else ""
            nll = f"{base['value']:.3f} | {task['value']:.3f}{spread}"
            characters = f"{base['nll_per_character']:.3f} | {task['nll_per_character']:.3f}"
            rows.append(f"| {_text(name)} | {task['n']} | {nll} | {characters} |")
    if not rows:
        return ""
    titles = ("held-out rows", "n", "NLL per token before", "after", "NLL per character before", "after")
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    title = "## Results\n\nNegative log-likelihood of the gold answer in nats, ± its standard error; lower is better.\n"
    return "\n".join([title, head, *rows])


def _benchmark_table(results: dict[str, Any]) -> str:
    """Return the main metric of every evaluated task with its 95 % interval."""
    rows = []
    for name, task in results["tasks"].items():
        if task.get("metric") and task.get("base") is None and isinstance(task.get("value"), (int, float)):
            error = task.get("stderr")
            margin = f" ± {ERRORS_OF_95 * error:.2f}" if error is not None and math.isfinite(error) else ""
            metric = f"{_text(str(task['metric']))}{'' if task.get('higher_is_better') else ' (lower is better)'}"
            rows.append(f"| {_text(name)} | {metric} | {task['value']:.2f}{margin} | {task.get('n')} |")
    head = [
        "## Benchmarks\n\n± is half of the 95 % interval over items.\n",
        "| task | metric | value | n |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) if rows else ""


def _hub_results(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results as the Hub's `model-index` has them."""
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {
                "name": name,
                "type": str(task.get("benchmark") or name),
                "split": str(task.get("split") or "test"),
            },
            "metrics": [{"type": str(task["metric"]), "value": round(float(task["value"]), 4)}],
        }
        for name, task in results["tasks"].items()
        if task.get("metric") and isinstance(task.get("value"), (int, float)) and math.isfinite(task["value"])
    ]


def _data_line(config: RunConfig) -> str:
    """Return the rows that were trained on, by name; a local path's folders are nobody else's concern."""
    paths = [source.path for source in config.data.sources]
    names = ", ".join(_text(Path(path).name if Path(path).suffix else path) for path in paths)
    replayed = config.data.english_ratio if METHODS[config.method].replay else 0
    replay = f"; {replayed:.0%} of the rows are their English" if replayed else ""
    return f"Trained on {names}{replay}."


def _text(name: str) -> str:
    """Return a name from the configuration as one line of plain text: no markup, no HTML, no secret."""
    return markdown(redact(name))
