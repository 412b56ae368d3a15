"""`pivotune evaluate` as it is typed: what is printed and written, wrong input, and a process that is killed."""

from __future__ import annotations

import gzip
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import save_tiny_model

from pivotune.cli.main import main

pytest.importorskip("lm_eval")

QUESTIONS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    for language in ("de", "en"):
        questions = [
            {
                "id": f"q{index}",
                "question": f"Frage {index}?",
                "answers": [{"text": f"Antwort {index}", "answer_start": 0}],
            }
            for index in range(QUESTIONS)
        ]
        content = {"data": [{"title": "t", "paragraphs": [{"context": "Die Katze sitzt.", "qas": questions}]}]}
        (folder / f"xquad.{language}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "newstest2019-src.eng.txt").write_text("The cat.\nThe dog.\nA house.\n")
    (folder / "newstest2019-ref.deu.txt").write_text("Die Katze.\nDer Hund.\nEin Haus.\n")
    return folder


def evaluate(*words) -> int:
    return main(["evaluate", *map(str, words)])


def one_error(capsys, *words) -> str:
    assert evaluate(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def items(folder: Path) -> list[dict]:
    with gzip.open(folder / "results.items.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_what_is_printed_and_written(model, data, tmp_path, capsys):
    words = ["--tasks", "xquad_de,xquad_en,ntrex_de", "--data-dir", data, "--limit", 3, "--max-new-tokens", 4]
    assert evaluate(model, *words, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    for text in (
        "template  chat",
        "xquad_de: 3 items (validation) from xquad.de.json",
        "Kontext: Die Katze sitzt.",
        "f1",
        "exact_match",
    ):
        assert text in out
    assert "English was not evaluated" not in out
    assert logging.getLogger("huggingface_hub").level == logging.ERROR  # its client warns at each retry
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["tasks"]) == {"xquad_de", "xquad_en", "ntrex_en-de", "ntrex_de-en"}
    assert len(items(tmp_path)) == 12
    assert (tmp_path / "evaluation-cache").is_dir()


def test_json_is_all_there_is_on_stdout(model, data, tmp_path, capsys):
    words = ["--tasks", "xquad_de", "--data-dir", data, "--limit", 2, "--max-new-tokens", 4, "--no-cache", "--json"]
    assert evaluate(model, *words, "--out", tmp_path / "de.json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tasks"]["xquad_de"]["n"] == 2
    assert printed["tasks"]["xquad_de"] == json.loads((tmp_path / "de.json").read_text())["tasks"]["xquad_de"]
    assert not (tmp_path / "evaluation-cache").exists()


def test_a_smaller_sample_that_replaces_a_larger_one_is_told(model, data, tmp_path, capsys):
    words = ["--tasks", "xquad_de", "--data-dir", data, "--max-new-tokens", 4, "--out", tmp_path]
    assert evaluate(model, *words, "--limit", 3) == 0
    assert "is replaced" not in capsys.readouterr().err
    assert evaluate(model, *words, "--limit", 2) == 0
    assert "xquad_de: the earlier result (n = 3)" in capsys.readouterr().err


def test_a_file_in_the_results_place_is_found_before_anything_is_read(model, tmp_path, capsys):
    (tmp_path / "results.txt").write_text("mine")
    words = ["--tasks", "nothing_xx", "--data-dir", tmp_path / "none", "--out", tmp_path / "results.txt"]
    assert "--out" in one_error(capsys, model, *words)
    assert (tmp_path / "results.txt").read_text() == "mine"


def test_harm_to_english_is_asked_for(model, data, tmp_path, capsys):
    words = ["--tasks", "xquad_de", "--data-dir", data, "--limit", 2, "--max-new-tokens", 4, "--out", tmp_path]
    assert evaluate(model, *words) == 0
    assert "English was not evaluated" in capsys.readouterr().out


def test_results_of_a_model_go_to_a_folder_of_its_own(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(model, "--tasks", "xquad_de", "--data-dir", data, "--limit", 2, "--max-new-tokens", 4) == 0
    assert (tmp_path / "results" / model.name / "results.json").is_file()


def test_list_tasks(capsys):
    assert evaluate("--list-tasks") == 0
    out = capsys.readouterr().out
    for text in ("xquad", "xstorycloze", "paper:", "english:"):
        assert text in out
    assert evaluate("--list-tasks", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert "vi" in listed["benchmarks"]["xquad"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing argument RUN_OR_MODEL"),
        (["{model}"], "--tasks: none given"),
        (["{model}", "--tasks", "xqad_de"], "no task 'xqad_de'; near: xquad_de"),
        (["{model}", "--tasks", "xquad_vi"], "xquad_vi: no xquad.vi.json below"),
        (["{model}", "--tasks", "xquad", "--lang", "de,jp"], "--lang: 'jp' is not a language code; Japanese is ja"),
        (["{model}", "--tasks", "xcopa_de"], "XCOPA has no language 'de'"),
        (["{model}", "--tasks", "xquad_de", "--split", "train"], "has no split 'train'"),
        (["{model}", "--tasks", "xquad_de", "--batch-size", "many"], "--batch-size: 'many' found"),
        (["{model}", "--tasks", "xquad_de", "--backend", "tgi"], "--backend: 'tgi' found; allowed: hf, vllm"),
        (
            ["{model}", "--tasks", "xquad_de", "--dtype", "int3"],
            "--dtype: 'int3' found; allowed: auto, float32, bfloat16",
        ),
        (["{model}", "--tasks", "ntrex_de", "--comet", "x.ckpt"], "--comet: "),
        (["{model}", "--tasks", "xquad_de", "--english", "x.txt"], "--english goes with --pairs"),
        (["{model}", "--tasks", "xquad_de", "--pairs", "x.txt"], "--pairs: x.txt is not a file"),
        (["no-such-folder/at-all/x", "--tasks", "xquad_de"], "no-such-folder"),
        (["{model}", "--tasks", "xquad_de", "--template", "none.jinja"], "none.jinja"),
    ],
)
def test_bad_input_is_one_line(model, data, capsys, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [str(model) if word == "{model}" else word for word in words]
    assert message in one_error(capsys, *words, "--data-dir", data)
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_not_there(model, capsys, tmp_path):
    assert "is not a folder" in one_error(capsys, model, "--tasks", "xquad_de", "--data-dir", tmp_path / "none")


def test_a_malformed_file_is_named(model, capsys, tmp_path):
    (tmp_path / "xquad.de.json").write_text('{"data": [{"title": "t"}]}')
    assert "xquad.de.json" in one_error(capsys, model, "--tasks", "xquad_de", "--data-dir", tmp_path)


def test_results_of_another_model_are_not_overwritten(model, data, tmp_path, capsys):
    words = ["--tasks", "xquad_de", "--data-dir", data, "--limit", 2, "--max-new-tokens", 4, "--out", tmp_path]
    (tmp_path / "results.json").write_text('{"model": "another/model", "tasks": {}}')
    assert evaluate(model, *words) == 2
    assert "holds results of another/model" in capsys.readouterr().err


_KILLED = """
import os, signal, sys
from pivotune.cli.main import main
from pivotune.evaluation.cache import AnswerCache

add, kept = AnswerCache.add, 0

def add_or_die(self, answers):
    global kept
    if kept >= 50:
        os.kill(os.getpid(), signal.SIGKILL)
    kept += len(answers)
    add(self, answers)

AnswerCache.add = add_or_die
main(sys.argv[1:])
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(model, data, tmp_path):
    """`kill -9` while answers are coming in; the second start asks only for the rest and ends with the same bytes."""
    options = ["--tasks", "xquad_de,xquad_en", "--data-dir", data, "--batch-size", "1", "--max-new-tokens", "8"]

    def words(out: Path) -> list[str]:
        return [str(word) for word in ("evaluate", model, *options, "--out", out)]

    assert main(words(tmp_path / "whole")) == 0
    killed = subprocess.run([sys.executable, "-c", _KILLED, *words(tmp_path / "parts")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert count_answers(tmp_path / "parts" / "evaluation-cache") == 50
    assert main(words(tmp_path / "parts")) == 0
    # Every answer once: what was kept was not computed again.
    expected = count_answers(tmp_path / "whole" / "evaluation-cache")
    assert count_answers(tmp_path / "parts" / "evaluation-cache") == expected > 50
    assert items(tmp_path / "parts") == items(tmp_path / "whole")
    assert (tmp_path / "parts" / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()


def count_answers(cache: Path) -> int:
    return sum(
        line.startswith('{"request"') for path in cache.glob("*.jsonl") for line in path.read_text().splitlines()
    )
