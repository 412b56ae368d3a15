from __future__ import annotations

import math

import pytest
import yaml

from pivotune.config.yaml_text import parse_config
from pivotune.runs.model_card import model_card

TASK = {
    "metric": "nll", "value": 1.23456, "stderr": 0.0517, "n": 37, "nll_per_character": 0.3217,
    "base": {"value": 2.3456, "stderr": 0.06, "nll_per_character": 0.6171},
}  # fmt: skip
RESULTS = {"model": "owner/base", "method": "deep-supervision", "tasks": {"heldout_sw": TASK}}
LAYERS = {"conversion": 2, "thinking": 15, "num_layers": 32, "reason": "the two falls of the entropy"}


def config(**changes):
    data = {"train": "rows.jsonl", "language": "sw", **changes.pop("data", {})}
    return parse_config({"model": "owner/base", "data": data, "output_dir": "runs/sw", **changes})


def metadata(card: str) -> dict:
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def test_metadata_block_of_the_hub():
    assert metadata(model_card(config(), LAYERS, RESULTS)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["sw", "en"],
        "base_model": "owner/base",
        "tags": ["pivotune", "deep-supervision"],
        "model-index": [
            {
                "name": "model",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "heldout_sw", "type": "heldout_sw", "split": "test"},
                        "metrics": [{"type": "nll", "value": 1.2346}],
                    }
                ],
            }
        ],
    }


def test_the_hub_reads_the_results():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    (found,) = huggingface_hub.ModelCard(model_card(config(), LAYERS, RESULTS, "owner/name")).data.eval_results
    assert (found.metric_type, found.metric_value, found.dataset_name) == ("nll", 1.2346, "heldout_sw")


def test_benchmarks_stand_with_their_95_percent_interval():
    task = {"metric": "f1", "value": 29.654, "stderr": 1.2, "n": 1190, "higher_is_better": True}
    card = model_card(config(), LAYERS, {"tasks": {"heldout_sw": TASK, "xquad_sw": task}})
    assert r"| xquad\_sw | f1 | 29.65 ± 2.35 | 1190 |" in card


def test_data_and_picture():
    card = model_card(config(data={"train": "/home/me/rows.jsonl"}), LAYERS, RESULTS, figure="training.png")
    assert "Trained on rows.jsonl; 25% of the rows are their English." in card.replace("\\", "")
    assert "](training.png)" in card
    assert "![" not in model_card(config(), LAYERS, RESULTS)


def test_norwegian_is_no_boolean():
    assert metadata(model_card(config(data={"language": "no"}), None, RESULTS))["language"] == ["no", "en"]


def test_base_model_is_a_name_of_the_hub_or_absent(tmp_path):
    assert "base_model" not in metadata(model_card(config(model=str(tmp_path)), None, RESULTS))
    assert "base_model" not in metadata(model_card(config(model="bundled:smollm2-135m-instruct"), None, RESULTS))


def test_numbers_layers_and_configuration():
    card = model_card(config(), LAYERS, RESULTS)
    assert r"| heldout\_sw | 37 | 2.346 | 1.235 ± 0.052 | 0.617 | 0.322 |" in card
    assert "Thinking at layer 15 of 32 (the two falls of the entropy)." in card
    both = model_card(config(supervision={"conversion": {}}), LAYERS, RESULTS)
    assert "Conversion at layer 2, thinking at layer 15 of 32 (the two falls of the entropy)." in both
    (block,) = [part.split("```")[0] for part in card.split("```yaml\n")[1:]]
    assert parse_config(yaml.safe_load(block)) == config()


@pytest.mark.parametrize(("method", "words"), [("tft", "Translated fine-tuning"), ("sft", "on the English side")])
def test_baselines_have_no_layers(method, words):
    card = model_card(config(method=method), None, {"tasks": {}})
    assert words in card
    assert "## Layers" not in card
    assert "## Results" not in card


def test_one_row_has_no_spread():
    results = {"tasks": {"heldout_sw": {**TASK, "stderr": math.nan, "n": 1}}}
    assert "| 1.235 | 0.617 |" in model_card(config(), None, results)
