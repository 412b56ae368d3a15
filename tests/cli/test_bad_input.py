"""Every mistake a user can make with `pivotune train`: one line, exit code 2, nothing loaded, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

# Imported before a test changes one of them: a module that is imported meanwhile would keep the change.
import pivotune.models.loading
import pivotune.runs.execute
import pivotune.training.trainer
from pivotune.cli.main import main
from pivotune.config.yaml_text import dump_config, parse_config

NUM_ROWS = 16


class Case:
    """A good run in a folder of its own, to be spoiled: `settings`, the rows in `data`, the model in `model`."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.data = folder / "pairs.jsonl"
        self.model = folder / "model"
        self.output = folder / "run"
        shutil.copytree(model, self.model)
        self.rows = tiny_rows(NUM_ROWS)
        self.settings: dict[str, Any] = {
            "model": str(self.model),
            "data": {"train": str(self.data), "validation": 2, "language": "sw"},
            "supervision": {"conversion": {"layer": 1}, "thinking": {"layer": 3}},
            "training": {"max_steps": 1},
            "output_dir": str(self.output),
        }
        self.changes: list[str] = []
        self.write_rows()

    def write_rows(self) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def arguments(self) -> list[str]:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.settings), encoding="utf-8")
        return ["train", str(path), *(word for change in self.changes for word in ("--set", change))]


CASES: dict[str, Callable[[Case], str]] = {}


def case(spoil: Callable[[Case], str]) -> Callable[[Case], str]:
    """Spoils a run and returns the message that must come."""
    CASES[spoil.__name__] = spoil
    return spoil


def by_set(name: str, expected: str, *changes: str) -> None:
    """A case that `--set` alone makes; FOLDER stands for the test's folder."""

    def spoil(run: Case) -> str:
        run.changes += [change.replace("FOLDER", str(run.folder)) for change in changes]
        keys = ", ".join(change.partition("=")[0] for change in changes)
        return expected.replace("run.yaml:", f"run.yaml with --set {keys}:").replace("FOLDER", str(run.folder))

    CASES[name] = spoil


# ---- the data ----

by_set("missing_file", "FOLDER/pair.jsonl: no such file; did you mean FOLDER/pairs.jsonl?",
       "data.train=FOLDER/pair.jsonl")  # fmt: skip
by_set("missing_folder", "FOLDER/no/pairs.jsonl: no such file, and no folder FOLDER/no",
       "data.train=FOLDER/no/pairs.jsonl")  # fmt: skip
by_set("missing_validation_file", "FOLDER/held.jsonl: no such file", "data.validation=FOLDER/held.jsonl")
by_set("validation_larger_than_the_data",
       f"data.validation: 99 rows asked for, the data has {NUM_ROWS}; at least one must be left for training",
       "data.validation=99")  # fmt: skip
by_set("template_takes_all_prompt_tokens",
       "FOLDER/pairs.jsonl: line 1: the template alone takes more than the 3 tokens of data.max_prompt_tokens; allow more "
       "(it takes 6)",
       "data.max_prompt_tokens=3")  # fmt: skip


@case
def missing_english_file(run: Case) -> str:
    run.rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in run.rows]
    run.write_rows()
    run.changes.append(f"data.english={run.folder}/pairs.en.jsonl")
    return f"{run.folder}/pairs.en.jsonl: no such file; did you mean {run.data}?"


@case
def empty_file(run: Case) -> str:
    run.data.write_text("")
    return f"{run.data}: the file is empty"


@case
def file_of_blank_lines(run: Case) -> str:
    run.data.write_text("\n\n")
    return f"{run.data}: holds no rows"


@case
def unknown_file_type(run: Case) -> str:
    path = run.data.rename(run.folder / "pairs.xlsx")
    run.settings["data"]["train"] = str(path)
    return f"{path}: unknown file type; allowed: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, each also with .gz"


@case
def broken_json(run: Case) -> str:
    lines = run.data.read_text().splitlines()
    lines[2] = '{"prompt": "Namba", completion}'
    run.data.write_text("\n".join(lines))
    return f"{run.data}, line 3, column 21: broken JSON: "


@case
def row_without_english(run: Case) -> str:
    del run.rows[3]["completion_en"]
    run.write_rows()
    return (
        f"{run.data}, line 4: `completion_en` is missing, needed by method deep-supervision; 1 of {NUM_ROWS} rows is "
        "like this (use data.on_bad_row: skip to leave them out)"
    )


@case
def row_without_english_for_replay(run: Case) -> str:
    run.settings["method"] = "tft"
    for row in run.rows[5:]:
        del row["prompt_en"]
    run.write_rows()
    return (
        f"{run.data}, line 6: `prompt_en` is missing, needed by data.english_ratio 0.25 (0 for none); 11 of {NUM_ROWS} "
        "rows are like this (use data.on_bad_row: skip to leave them out)"
    )


@case
def empty_answer(run: Case) -> str:
    run.rows[1]["completion"] = "  "
    run.write_rows()
    return f"{run.data}, line 2: `completion` is empty, needed by method deep-supervision; 1 of {NUM_ROWS} rows is like"


@case
def answer_cut_to_nothing(run: Case) -> str:
    run.rows[4]["prompt"] = "ዳታ" * 100
    run.write_rows()
    run.changes.append("data.max_prompt_tokens=2000")
    return f"{run.data}: line 5: the prompt fills the model's 256 tokens and nothing is left for the answer; lower "


# ---- the configuration ----

by_set("unknown_key", "FOLDER/run.yaml: unknown key supervision.thinking.layr; did you mean supervision.thinking.layer?",
       "supervision.thinking.layr=3")  # fmt: skip
by_set("unknown_method",
       "FOLDER/run.yaml: method: 'dft' is not allowed; allowed: 'english-only', 'tft', 'deep-supervision', "
       "'cross-lingual', 'sdrrl' or 'plug'",
       "method=dft")  # fmt: skip
by_set("unknown_signal",
       "FOLDER/run.yaml: supervision.conversion.signal: 'logit' is not allowed; "
       "allowed: 'logits', 'feature', 'contrastive', 'cka' or 'none'",
       "supervision.conversion.signal=logit")  # fmt: skip
by_set("no_signal", "FOLDER/run.yaml: supervision: both signals are none; that is method: tft",
       "supervision.conversion.signal=none", "supervision.thinking.signal=none")  # fmt: skip


@case
def a_set_key_beside_the_wrong_one(run: Case) -> str:
    run.settings["seed"] = "x"
    run.changes += ["training.max_steps=2", "supervision.thinking.weight=0.1"]
    return f"{run.folder}/run.yaml: seed: 'x' is not allowed; allowed: a whole number"


by_set("negative_weight",
       "FOLDER/run.yaml: supervision.thinking.weight: -0.3 is not allowed; allowed: at least 0",
       "supervision.thinking.weight=-0.3")  # fmt: skip
by_set("layer_0",
       "FOLDER/run.yaml: supervision.conversion.layer: 0 is not allowed; allowed: at least 1, or 'auto'",
       "supervision.conversion.layer=0")  # fmt: skip
by_set("layer_L", "supervision.thinking.layer: 4 is not allowed; the model has 4 layers, choose 1 to 3",
       "supervision.thinking.layer=4")  # fmt: skip
by_set("layer_beyond_L", "supervision.thinking.layer: 40 is not allowed; the model has 4 layers, choose 1 to 3",
       "supervision.thinking.layer=40")  # fmt: skip
by_set("conversion_beyond_L", "supervision.conversion.layer: 40 is not allowed; the model has 4 layers, choose 1 to 3",
       "supervision.conversion.layer=40", "supervision.thinking.signal=none")  # fmt: skip
by_set("conversion_not_below_thinking",
       "FOLDER/run.yaml: supervision.conversion.layer: 3 is not below supervision.thinking.layer: 3; conversion comes "
       "before thinking", "supervision.conversion.layer=3")  # fmt: skip
by_set("unknown_training_key",
       "FOLDER/run.yaml: unknown key training.lerning_rate; did you mean training.learning_rate? (fields of "
       "transformers.TrainingArguments)", "training.lerning_rate=1e-4")  # fmt: skip
by_set("training_key_of_another_place",
       "FOLDER/run.yaml: training.seed is set outside of training: (see `pivotune init`)", "training.seed=1")  # fmt: skip
by_set("training_choice",
       "FOLDER/run.yaml: training.lr_scheduler_type: 'foo' is not allowed; allowed: linear, cosine, ",
       "training.lr_scheduler_type=foo")  # fmt: skip
by_set("training_value_of_the_wrong_type", "FOLDER/run.yaml: training.bf16: 'perhaps' is not allowed; allowed: ",
       "training.bf16=perhaps")  # fmt: skip
by_set("training_number_of_the_wrong_type",
       "FOLDER/run.yaml: training.per_device_train_batch_size: 'big' is not allowed; allowed: a whole number",
       "training.per_device_train_batch_size=big")  # fmt: skip
by_set("training_field_without_effect",
       "FOLDER/run.yaml: training.label_smoothing_factor: 0.1 is not supported: the cross-entropy in chunks has no "
       "smoothing; set weight_decay or interpolate", "training.label_smoothing_factor=0.1")  # fmt: skip
by_set("metric_that_no_evaluation_has",
       "training.metric_for_best_model: eval_loss is not measured; allowed: eval_target_loss, eval_target_nll, ",
       "training.metric_for_best_model=eval_loss", "training.eval_strategy=epoch")  # fmt: skip
by_set("schedule_without_its_options",
       "training.lr_scheduler_type: cosine_with_min_lr: One of min_lr or min_lr_rate should be set through the ",
       "training.lr_scheduler_type=cosine_with_min_lr")  # fmt: skip
by_set("reporting_package_not_installed", "training.report_to: wandb: WandbCallback requires wandb to be installed. Run ",
       "training.report_to=wandb")  # fmt: skip
by_set("evaluation_without_rows",
       "training.eval_on_start: true needs held-out rows and data.validation: 0 gives none",
       "training.eval_on_start=true", "data.validation=0")  # fmt: skip
by_set("broken_set", "--set seed: expected key=value, such as training.learning_rate=1e-4", "seed")


# ---- template, tokenizer and model ----


@case
def template_without_an_answer_slot(run: Case) -> str:
    path = run.folder / "mine.jinja"
    path.write_text("Q: {{ prompt }}\nA:")
    run.changes.append(f"data.template={path}")
    return f"template {path}: no {{{{ completion }}}} slot; exactly one is needed"


by_set("template_that_is_none", "data.template: alpacca is not chat, alpaca or an existing Jinja file",
       "data.template=alpacca")  # fmt: skip


@case
def tokenizer_without_end_of_text(run: Case) -> str:
    build_tiny_tokenizer(eos_token=None).save_pretrained(run.model)
    return (
        f"{run.model}: the tokenizer has no end-of-text token, so no answer could end; "
        'set "eos_token" in its tokenizer_config.json'
    )


@case
def model_without_tokenizer(run: Case) -> str:
    for path in run.model.glob("tokenizer*"):
        path.unlink()
    return f"{run.model}: no tokenizer beside the model; looked for "


@case
def lora_on_a_tied_head(run: Case) -> str:
    build_tiny_model(tie_word_embeddings=True).save_pretrained(run.model)
    run.changes.append("lora={r: 2, target_modules: [q_proj, lm_head]}")
    return (
        "lora.target_modules: lm_head is not allowed; this model ties its head to its embedding and an adapter on one "
        "would merge into both"
    )


by_set("lora_on_modules_that_are_not_there", "lora.target_modules: Target modules {'query_proj'} not found",
       "lora={target_modules: [query_proj]}")  # fmt: skip
by_set("hub_name_offline",
       "nobody/no-model: no such folder, and the Hugging Face Hub is out of reach (offline?) and its cache here does not "
       "hold this model; bundled:smollm2-135m-instruct needs no network", "model=nobody/no-model")  # fmt: skip
by_set("missing_model_folder", "FOLDER/no-model: no such folder; allowed: a model folder, a run folder, a Hub name",
       "model=FOLDER/no-model")  # fmt: skip
by_set("unknown_bundled_model", "bundled:smollm3: ", "model=bundled:smollm3")


@case
def model_folder_without_weights(run: Case) -> str:
    (run.model / "model.safetensors").unlink()
    return f"{run.model}: no weights; looked for model.safetensors or model.safetensors.index.json"


@case
def model_that_is_no_decoder(run: Case) -> str:
    path = run.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bert", "architectures": ["BertModel"]}))
    return f"{run.model}: "


# ---- the output folder ----


@case
def output_folder_of_another_run(run: Case) -> str:
    run.output.mkdir()
    other = parse_config({"model": "other", "data": {"train": "x.csv"}, "output_dir": str(run.output)})
    (run.output / "config.yaml").write_text(dump_config(other))
    return f"output_dir: {run.output} already holds a run; add --resume to go on with it or --overwrite"


@case
def output_folder_with_other_files(run: Case) -> str:
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("years of work")
    return f"output_dir: {run.output} is not empty and holds no run; choose another folder"


@case
def output_that_is_a_file(run: Case) -> str:
    run.output.write_text("something")
    return f"output_dir: {run.output} is a file"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    build_tiny_model().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Names of the models that were loaded; loading one fails."""
    names: list[str] = []

    def load_model(name: str, **options: Any) -> Any:
        names.append(name)
        raise RuntimeError("a model was loaded")

    for module in (pivotune.models.loading, pivotune.runs.execute, pivotune.training.trainer):
        monkeypatch.setattr(module, "load_model", load_model)
    return names


def content(path: Path) -> Any:
    """What lies at a path: None, the bytes of a file, or the files of a folder."""
    if path.is_dir():
        return {str(entry.relative_to(path)): content(entry) for entry in path.rglob("*")}
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_before_anything_happens(name, tmp_path, model, loaded, capsys):
    run = Case(tmp_path, model)
    expected = CASES[name](run)
    arguments = run.arguments()
    before = content(tmp_path)
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pivotune: error: {expected}")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert code == 2
    assert captured.out == ""
    assert loaded == []
    assert content(tmp_path) == before


def test_the_run_that_the_cases_spoil_is_good(tmp_path, model, loaded, capsys):
    """It gets as far as loading the model, so every case above fails for its own reason."""
    run = Case(tmp_path, model)
    assert main(run.arguments()) == 1
    assert loaded == [str(run.model)]
    assert "a model was loaded" in capsys.readouterr().err
