"""Two target languages on the command line: `train`, and the commands that read its run."""

from __future__ import annotations

import json

import pytest
import yaml
from cli_runs import metrics, write_config, write_jsonl
from conftest import tiny_rows
from tiny_training import save_tiny_model

from pivotune.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 24 rows of Swahili and 8 that are called German, a quarter of each held out."""
    folder = tmp_path_factory.mktemp("languages")
    save_tiny_model(folder / "base", max_position_embeddings=1024)
    sources = [
        {"path": str(write_jsonl(folder / f"{code}.jsonl", tiny_rows(count))), "language": code}
        for code, count in (("sw", 24), ("de", 8))
    ]
    config = write_config(folder, folder / "base", "", method="tft", data={"train": sources, "validation": 8})
    settings = yaml.safe_load(config.read_text())
    settings["data"]["language_temperature"] = 2
    settings["training"] |= {"eval_strategy": "steps", "eval_steps": 1, "use_cpu": True}
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config)]) == 0
    return folder / "run"


def test_train_scores_and_describes_both_languages(run, capsys):
    assert main(["train", str(run.parent / "run.yaml"), "--resume", "--set", "training.max_steps=3"]) == 0
    out = capsys.readouterr().out
    # Square roots of 18 and 6 rows.
    assert "sw: 15 rows an epoch (18 without data.language_temperature 2)" in out
    assert "de: 9 rows an epoch (6 without data.language_temperature 2)" in out
    assert metrics(run)[-1]["step"] == 3
    assert {"eval_sw_nll", "eval_de_nll", "eval_target_nll", "eval_english_nll"} <= {
        key for line in metrics(run) for key in line
    }
    tasks = json.loads((run / "results.json").read_text())["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {"heldout_sw": 6, "heldout_de": 2, "heldout_en": 8}
    card = (run / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["language"] == ["sw", "de", "en"]
    assert "fine-tuned for sw, de\n" in card
    written = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (written["language"], written["train"][1]["language"]) == (["sw", "de"], "de")
    assert main(["train", str(run / "config.yaml"), "--set", f"output_dir={run.parent / 'again'}"]) == 0


def test_estimate_counts_the_rows_of_an_epoch(run, capsys):
    assert main(["estimate", str(run.parent / "run.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["strategies"][0]["schedule"]["rows"] == 24


def test_evaluate_takes_all_languages_and_compare_and_report_show_them(run, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    question = {"id": "q", "question": "Frage?", "answers": [{"text": "Antwort", "answer_start": 0}]}
    content = {"data": [{"title": "t", "paragraphs": [{"context": "Die Katze.", "qas": [question]}]}]}
    for code in ("sw", "de"):
        (tmp_path / f"newstest2019-ref.{ {'sw': 'swa', 'de': 'deu'}[code] }.txt").write_text("Moja.\nMbili.\n")
    (tmp_path / "newstest2019-src.eng.txt").write_text("One.\nTwo.\n")
    (tmp_path / "xquad.de.json").write_text(json.dumps(content))
    words = ["--data-dir", str(tmp_path), "--max-new-tokens", "2"]
    assert main(["evaluate", str(run), "--tasks", "ntrex", *words]) == 0
    tasks = json.loads((run / "results.json").read_text())["tasks"]
    assert {"ntrex_en-sw", "ntrex_sw-en", "ntrex_en-de", "ntrex_de-en", "heldout_sw", "heldout_de"} <= tasks.keys()
    capsys.readouterr()
    assert main(["compare", str(run), "--out", str(tmp_path / "table.csv")]) == 0
    table = (tmp_path / "table.csv").read_text()
    assert all(f",{name},heldout,{name[8:]},nll," in table for name in ("heldout_sw", "heldout_de", "heldout_en"))
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "fine-tuned for sw, de with tft" in page
    assert "pivotune data check FILE --lang LANGUAGE" in page


def test_a_language_that_no_row_has_is_refused_before_anything_is_written(run, tmp_path, capsys):
    changes = ["--set", "data.language=[sw,vi]", "--set", f"output_dir={tmp_path / 'other'}"]
    assert main(["train", str(run.parent / "run.yaml"), *changes]) == 2
    assert (
        f"{run.parent / 'de.jsonl'}, line 1: language: de found; allowed: sw, vi (data.language)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "other").exists()
