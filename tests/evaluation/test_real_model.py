"""The small real model on real files: the harness's own tasks on the same files must agree, question by question."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pivotune.evaluation.prepare import EvaluationSettings
from pivotune.evaluation.run import execute_evaluation, prepare_evaluation

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")

LIMIT = 8


def items(out: Path) -> dict[str, dict]:
    with gzip.open(out / "results.items.jsonl.gz", "rt", encoding="utf-8") as file:
        return {record["item"]: record for record in map(json.loads, file)}


def harness(model: str, task: str, files: dict[str, str], **changes):
    """lm-evaluation-harness runs its own task definition over local files, with its own language model class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from pivotune.models.loading import load_model, load_tokenizer

    own = {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **changes,
    }
    lm = HFLM(pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=8)
    results = simple_evaluate(lm, tasks=[{"group": "own", "task": [own]}], limit=LIMIT, bootstrap_iters=0)
    return results["results"][task]["acc,none"], [sample["acc"] for sample in results["samples"][task]]


@pytest.mark.exhaustive
def test_xcopa_equals_the_harness(smollm2, shared_data, tmp_path):
    file = shared_data / "eval" / "xcopa" / "test.vi.jsonl"
    accuracy, correct = harness(smollm2, "xcopa_vi", {"test": str(file)}, validation_split=None)
    settings = EvaluationSettings(data_dir=file.parent, limit=LIMIT, template="none")
    ours = execute_evaluation(prepare_evaluation(smollm2, ["xcopa_vi"], settings), tmp_path)["tasks"]["xcopa_vi"]
    assert ours["value"] / 100 == pytest.approx(accuracy)
    assert [record["correct"] for record in items(tmp_path).values()] == correct


@pytest.mark.exhaustive
def test_every_kind_of_task_on_real_files(smollm2, shared_data, tmp_path):
    """All sets at hand, a few items each, through the run's template; the model knows some English."""
    settings = EvaluationSettings(data_dir=shared_data / "eval", limit=2, max_new_tokens=4)
    names = ["xquad_vi", "mlqa_zh", "mkqa_en", "truthfulqa_en", "xcopa_zh", "mmlu_ar", "flores_zh", "tatoeba_ar-en"]
    names.append("alignment_tatoeba_vi")
    tasks = execute_evaluation(prepare_evaluation(smollm2, names, settings), tmp_path)["tasks"]
    assert set(tasks) == {*names, "flores_en-zh", "flores_zh-en"} - {"flores_zh"}
    for name, entry in tasks.items():
        assert 0 < entry["n"] <= 2, name
        assert 0 <= entry["value"] <= 100, name
        if "nll_per_token" in entry["metrics"]:
            # Far below the 10.8 nats of guessing among 49,152 tokens.
            assert 0 < entry["metrics"]["nll_per_token"]["value"] < 9, name
