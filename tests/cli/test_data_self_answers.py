from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import write_jsonl
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.cli.main import main


@pytest.fixture
def folder(tmp_path) -> Path:
    model = build_tiny_model()
    # Without these ids, which are in three of the nine answers, a random model ends none.
    model.generation_config.eos_token_id = model.config.eos_token_id = [2, 157, 247, 313]
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(9))
    return tmp_path


def command(folder: Path, *options: str) -> list[str]:
    words = ["data", "self-answers", str(folder / "pairs.jsonl"), "--model", str(folder / "model")]
    return [*words, "--out", str(folder / "self.jsonl"), "--max-new-tokens", "12", "--batch-size", "2", *options]


def test_a_trial_and_the_rest(folder, capsys):
    assert main(command(folder, "--limit", "4")) == 0
    capsys.readouterr()
    assert main(command(folder)) == 0
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "self.answered.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [row["id"] for row in tiny_rows(9)]
    kept = {record["id"]: record["answer"] for record in records if "left_out" not in record}
    assert len(kept) == 3
    rows = [json.loads(line) for line in (folder / "self.jsonl").read_text().splitlines()]
    assert rows == [{**row, "completion_en": kept[row["id"]]} for row in tiny_rows(9) if row["id"] in kept]
    assert "rows     9 answered, 4 of them earlier: " in printed
    assert f"written  {len(kept)} rows in " in printed
    assert "left out: " in printed
    assert "the target answers are kept, and are no translations of these: train with sdrrl.translation: 0" in printed
    written = (folder / "self.jsonl").read_bytes()
    assert main(command(folder, "--overwrite")) == 0
    assert "earlier" not in capsys.readouterr().out
    assert (folder / "self.jsonl").read_bytes() == written


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--out", "FOLDER/self.csv"], "--out: FOLDER/self.csv found; allowed: a file name that ends in .jsonl"),
     (["--out", "FOLDER/pairs.jsonl"], "--out: FOLDER/pairs.jsonl would replace the data that is read"),
     (["--out", "FOLDER/taken.jsonl"], "--out: FOLDER/taken.jsonl exists and was not begun by this command"),
     (["--model", "FOLDER/modle"], "FOLDER/modle"),
     (["--max-new-tokens", "256"], "--max-new-tokens: 256 found; the model reads 256 tokens, prompt included"),
     (["--template", "mine.jinja"], "--template mine.jinja is not chat, alpaca or an existing Jinja file"),
     (["--batch-size", "0"], "Invalid value for '--batch-size'")],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(folder, capsys, options, message):
    (folder / "taken.jsonl").write_text("mine")
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert main(command(folder, *(option.replace("FOLDER", str(folder)) for option in options))) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message.replace("FOLDER", str(folder)) in error[0]
    assert sorted(folder.iterdir()) == before


def test_a_result_without_rows_is_an_error_and_keeps_the_answers(folder, capsys):
    assert main(command(folder, "--limit", "1")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    reason = "no row was kept (1 left out: the answer does not end within the token limit); all answers are in "
    assert f"{reason}{folder / 'self.answered.jsonl'}" in error
    assert len((folder / "self.answered.jsonl").read_text().splitlines()) == 1
    assert not (folder / "self.jsonl").exists()


def test_another_model_is_refused(folder, capsys):
    assert main(command(folder, "--limit", "4")) == 0
    (folder / "model").rename(folder / "other")
    assert main(command(folder, "--model", str(folder / "other"))) == 2
    assert f"was begun with model {str(folder / 'model')!r}, found {str(folder / 'other')!r}" in capsys.readouterr().err
