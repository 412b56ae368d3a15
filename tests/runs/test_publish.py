"""A model folder behaves elsewhere as the run did: same prompt, same end, same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import RAW
from conftest import build_tiny_tokenizer
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_training import assert_same, run_config, save_tiny_model, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from pivotune.cli.chat import Chatter, prepare_encoder
from pivotune.cli.main import main
from pivotune.data.templates import Turn
from pivotune.models.adapters import is_tied
from pivotune.models.loading import load_model, read_config
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run
from pivotune.runs.publish import export_run
from pivotune.training.heldout import end_token_ids

TURNS = "{{ '<|begin|>' }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|system|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
FILE = (
    "{% for turn in history %}\n{{ turn.role }}: {{ turn.content }}\n{% endfor %}\n Q: {{ prompt }}\n{# end #}\n"
    "A: {{ completion }}"
)
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


def train(
    folder: Path, *, family: str = "llama", chat_template: str | None = None, steps: int = 60, **changes: Any
) -> Path:
    """Train a tiny model; after 60 steps it answers `Ni moja.` to everything."""
    if not (folder / "base").exists():
        save_tiny_model(folder / "base", family)
        (folder / "base" / "chat_template.jinja").unlink()
        build_tiny_tokenizer(chat_template=chat_template).save_pretrained(folder / "base")
        rows = [{"prompt": f"Namba {i}?", "completion": "Ni moja.", "prompt_en": f"Number {i}?", "completion_en": "One."}
                for i in range(20)]  # fmt: skip
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "rows.jsonl"), "validation": 4, "language": "sw", "english_ratio": 0.0}
    config = run_config(folder, **{"method": "tft", "data": {**data, **changes.pop("data", {})}, **changes})
    config.training.update(max_steps=steps, learning_rate=1e-2)
    return execute_run(prepare_run(config)).folder


def plain_answer(model: Any, tokenizer: Any, question: str, most: int = 40) -> tuple[list[int], list[int]]:
    """Return prompt and new tokens of plain Transformers."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=most, do_sample=False)[0].tolist()
    length = prompt["input_ids"].shape[1]
    return ids[:length], ids[length:]


@pytest.mark.parametrize("template", ["chat", "alpaca", "file"])
def test_plain_transformers_sees_the_prompt_and_stops_as_in_training(tmp_path, template):
    """The turns end with a token that is neither the tokenizer's nor the model's end-of-text."""
    (tmp_path / "prompt.jinja").write_text(FILE, encoding="utf-8-sig")
    data = {"template": str(tmp_path / "prompt.jinja") if template == "file" else template}
    run = train(tmp_path, chat_template=TURNS if template == "chat" else None, data=data)
    (tmp_path / "prompt.jinja").unlink()
    export_run(run, tmp_path / "exported")
    encoder = prepare_encoder(str(run), None, None)
    expected = encoder.encode_prompt(Turn("Namba 3?"))
    answers = set()
    for folder in (run / "model", tmp_path / "exported"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompt, answer = plain_answer(model, AutoTokenizer.from_pretrained(folder), "Namba 3?")
        assert prompt == expected
        assert len(answer) < 40
        answers.add(tuple(answer))
    (answer,) = answers
    end = "<|system|>" if template == "chat" else "<|end|>"
    assert encoder.tokenizer.decode(list(answer)) == f"Ni moja.{end}"
    assert Chatter(str(run), encoder, load_model(str(run)), 40).answer("Namba 3?") == "Ni moja."


@pytest.mark.exhaustive
def test_every_family_answers_alike_from_the_run_and_with_plain_transformers(tmp_path, family):
    run = train(tmp_path, family=family, steps=2, chat_template=TURNS)
    export_run(run, tmp_path / "exported")
    encoder = prepare_encoder(str(run), None, None)
    ours = Chatter(str(run), encoder, load_model(str(run)), 12)
    ids = torch.tensor([encoder.encode_prompt(Turn("Namba 3?"))])
    with torch.inference_mode():
        ends = end_token_ids(ours.model, encoder.tokenizer, encoder.template)
        expected = ours.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends)[0].tolist()
    for folder in (run / "model", tmp_path / "exported"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompt, answer = plain_answer(model, AutoTokenizer.from_pretrained(folder), "Namba 3?", 12)
        assert prompt + answer == expected
        assert_same(weights(model), weights(ours.model))


def test_a_model_trained_with_alpaca_is_known_by_its_chat_template(tmp_path):
    run = train(tmp_path, data={"template": None})
    assert prepare_encoder(str(run / "model"), None, None).template.name == "alpaca"


def test_a_stored_head_that_the_configuration_calls_tied_is_kept(tmp_path):
    """Transformers loads both matrices; a saved configuration that says tied would drop one."""
    folder = Path(save_tiny_model(tmp_path / "base"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    assert not read_config(str(folder)).tie_word_embeddings
    model = load_model(str(folder))
    assert not is_tied(model)
    model.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), weights(model))


def test_one_matrix_stored_twice_stays_tied(tmp_path):
    folder = Path(save_tiny_model(tmp_path / "base", tie_word_embeddings=True))
    assert read_config(str(folder)).tie_word_embeddings


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("adapters"), lora=LORA, method="deep-supervision",
                 supervision={**RAW, "conversion": {"layer": 1}, "thinking": {"layer": 3}})  # fmt: skip


def test_adapters_alone_and_merged(adapters, tmp_path, capsys):
    assert main(["export", str(adapters), "--to", str(tmp_path / "alone")]) == 0
    assert main(["export", str(adapters), "--to", str(tmp_path / "merged"), "--merge-lora", "--dtype", "bfloat16"]) == 0
    assert f"saved {tmp_path / 'alone'}: model, tokenizer and card; AutoModelForCausalLM" in capsys.readouterr().out
    assert not (tmp_path / "alone" / "config.json").exists()
    assert (tmp_path / "alone" / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert "](training.png)" in (tmp_path / "alone" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(adapters.parent / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "alone").merge_and_unload()
    assert_same(weights(merged), weights(AutoModelForCausalLM.from_pretrained(adapters / "model")), 1e-6)
    rounded = {name: tensor.bfloat16() for name, tensor in weights(merged).items()}
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")), rounded)
    for name in ("alone", "merged"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert ModelCard.load(tmp_path / name / "README.md").data["tags"] == ["pivotune", "deep-supervision"]
        assert f'from_pretrained("{name}")' in (tmp_path / name / "README.md").read_text()


def test_interpolated_adapters_are_half_of_the_way(adapters, tmp_path):
    start = weights(AutoModelForCausalLM.from_pretrained(adapters.parent / "base"))
    end = weights(AutoModelForCausalLM.from_pretrained(adapters / "model"))
    halfway = {name: (start[name] + end[name]) / 2 for name in start}
    export_run(adapters, tmp_path / "merged", merge_lora=True, interpolate=0.5)
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), halfway, 1e-6)
    export_run(adapters, tmp_path / "alone", interpolate=0.5)
    base = AutoModelForCausalLM.from_pretrained(adapters.parent / "base")
    assert_same(weights(PeftModel.from_pretrained(base, tmp_path / "alone").merge_and_unload()), halfway, 1e-6)


def test_interpolated_weights_are_half_of_the_way(tmp_path):
    run = train(tmp_path)
    export_run(run, tmp_path / "half", interpolate=0.5)
    start, end, half = (
        weights(AutoModelForCausalLM.from_pretrained(folder))
        for folder in (tmp_path / "base", run / "model", tmp_path / "half")
    )
    assert_same(half, {name: (start[name] + end[name]) / 2 for name in start}, 1e-6)


# ---- the Hub ----


@pytest.fixture
def hub(monkeypatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **options: calls.append((a, options)))

    def upload(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    return calls


def test_push_uploads_the_exported_folder(adapters, hub, capsys):
    assert main(["push", str(adapters), "user/repo", "--private", "--merge-lora", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (created, (name, files)) = hub
    assert created == (("user/repo",), {"private": True, "exist_ok": True})
    assert name == "user/repo"
    assert files == sorted(found["files"])
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} < set(files)
    assert "checksums.json" not in files


def test_a_dry_run_uploads_nothing(adapters, hub, capsys):
    assert main(["push", str(adapters), "user/repo", "--dry-run", "--merge-lora"]) == 0
    assert hub == []
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert out.endswith("nothing was uploaded (--dry-run)\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "RUN/model", "--to", "NEW"], "RUN/model: not a finished run: no config.yaml"),
        (["export", "RUN", "--to", "RUN"], "--to: RUN exists and is not an empty folder; choose another one"),
        (
            ["export", "RUN", "--to", "NEW", "--dtype", "int8"],
            "--dtype: 'int8' found; allowed: auto, float32, bfloat16",
        ),
        (["push", "RUN", "user repo"], "user repo: not a name on the Hugging Face Hub; allowed: owner/name"),
        (["push", "RUN", "user/repo"], "RUN: adapters on BASE, which is not on the Hub; add --merge-lora"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(adapters, tmp_path, capsys, monkeypatch, hub, words, line):
    monkeypatch.setattr("pivotune.runs.publish.load_model", lambda *a, **o: pytest.fail("weights were loaded"))
    places = {"RUN": str(adapters), "NEW": str(tmp_path / "new"), "BASE": str(adapters.parent / "base")}
    for short, path in places.items():
        words, line = [word.replace(short, path) for word in words], line.replace(short, path)
    assert main(words) == 2
    assert capsys.readouterr().err == f"pivotune: error: {line}\n"
    assert hub == []
    assert not (tmp_path / "new").exists()


def test_merging_where_nothing_was_added(tmp_path, capsys):
    run = train(tmp_path)
    assert main(["export", str(run), "--to", str(tmp_path / "new"), "--merge-lora"]) == 2
    line = f"--merge-lora: {run} trained the whole model and has no adapters; leave it out"
    assert capsys.readouterr().err == f"pivotune: error: {line}\n"
