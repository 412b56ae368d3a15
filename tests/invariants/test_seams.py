"""A new objective, lens and method are one file and one registration each, and are trained with from YAML."""

from __future__ import annotations

import json

import pytest
import toys
import yaml
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.cli.main import main
from pivotune.config.registry import LENSES, METHODS, OBJECTIVES
from pivotune.config.yaml_text import parse_config
from pivotune.errors import UsageError

REGISTRIES = (METHODS, OBJECTIVES, LENSES)


@pytest.fixture(autouse=True)
def registered():
    before = [(dict(registry.entries), dict(registry.options)) for registry in REGISTRIES]
    OBJECTIVES.register("push", "toys:Push", options=toys.PushOptions)
    LENSES.register("halving", "toys:Halving")
    METHODS.register("both-prompts", "toys:BOTH_PROMPTS")
    yield
    for registry, (entries, options) in zip(REGISTRIES, before, strict=True):
        registry.entries, registry.options = entries, options


def settings(folder, **supervision):
    return {
        "model": str(folder / "model"),
        "method": "both-prompts",
        "data": {"train": str(folder / "rows.jsonl"), "validation": 2, "language": "sw"},
        "supervision": {"conversion": {"layer": 1}, "thinking": {"layer": 3, "signal": "push"}, **supervision},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
        },
        "output_dir": str(folder / "run"),
    }


def test_trained_from_yaml(tmp_path, capsys):
    build_tiny_model().save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    config = settings(tmp_path, schedule="constant", lens="halving", push={"power": 3})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    toys.Push.seen.clear()
    toys.Halving.layers.clear()
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert "compares the rows of one micro-batch" in capsys.readouterr().err
    assert (3, ["thinking"]) in toys.Push.seen
    # The lens reads the autoregressive loss at layer 1 and the toy loss at layer 3.
    assert toys.Halving.layers == {1, 3}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["thinking_loss"] > 0 and line["conversion_loss"] > 0 for line in lines if "loss" in line)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["supervision"]["push"] == {"power": 3}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == "both-prompts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push": {"powr": 3}}, r"unknown key supervision\.push\.powr; did you mean supervision\.push\.power\?"),
        ({"pusch": {"power": 3}}, r"unknown key supervision\.pusch"),
        ({"thinking": {"signal": "pusch"}}, r"allowed: 'logits', 'feature', 'contrastive', 'cka', 'push' or 'none'"),
        ({"lens": "halfing"}, r"allowed: 'logit', 'tuned', 'model' or 'halving'"),
    ],
)
def test_mistakes_name_the_registered_names(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        parse_config(settings(tmp_path, **changes))
