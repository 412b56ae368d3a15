"""The command line on the small real model and real Vietnamese rows."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pivotune.cli.main import main
from pivotune.training.lens_fitting import read_lens_figures

pytestmark = pytest.mark.slow


def test_training_on_real_rows_lowers_heldout_nll_and_the_model_answers(tmp_path, shared_data, smollm2, capfd):
    run = tmp_path / "run"
    settings = {
        "model": smollm2,
        "data": {
            "train": str(shared_data / "train" / "vi.jsonl.gz"),
            "limit": 16,
            "validation": 4,
            "language": "vi",
            "max_prompt_tokens": 64,
            "max_completion_tokens": 32,
        },
        "supervision": {"conversion": {}, "profile_rows": 2, "tuned": {"states": 800, "steps": 2}, "layers": "paper"},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 2e-4},
        "output_dir": str(run),
    }
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")

    assert main(["train", str(config), "--json"]) == 0

    results = json.loads(capfd.readouterr().out)
    task = results["tasks"]["heldout_vi"]
    assert task["n"] == 4
    assert task["value"] < task["base"]["value"]
    layers = json.loads((run / "layers.json").read_text(encoding="utf-8"))
    assert (layers["conversion"], layers["thinking"], layers["method"]) == (2, 14, "relative-depth")
    # The logit lens is noise at inner layers; a rough fit on 800 states reads several times as much.
    for figures in read_lens_figures(run / "lens.safetensors").values():
        assert figures.logit_kl > 8
        assert figures.kl < figures.logit_kl / 2
    first, *_ = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weighted = first["tft_loss"] + 0.3 * (first["conversion_loss"] + first["thinking_loss"])
    assert first["loss"] == pytest.approx(weighted, rel=1e-3)

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
