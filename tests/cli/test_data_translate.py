from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import write_jsonl
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows
from tiny_translators import save_tiny_translator, serve

import pivotune.translate.translators as translators
from pivotune.cli.main import main
from pivotune.data.sources import load_rows

KEY = "sk-0123456789abcdefghijklmnop"
SWAHILI = {row[f"{key}_en"]: row[key] for row in tiny_rows(40) for key in ("prompt", "completion")}


@pytest.fixture
def rows(tmp_path) -> Path:
    english = [
        {"id": row["id"], "instruction": row["prompt_en"], "output": row["completion_en"]} for row in tiny_rows(30)
    ]
    return write_jsonl(tmp_path / "alpaca.jsonl", english)


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(translators.time, "sleep", lambda seconds: None)


def command(rows: Path, *options: str, model: str = "chat", to: str = "sw") -> list[str]:
    out = str(rows.parent / "pairs.jsonl")
    return ["data", "translate", str(rows), "--to", to, "--model", model, "--out", out, *options]


def test_an_endpoint_that_fails_midway_and_the_same_command_again(rows, capsys):
    out = rows.parent / "pairs.jsonl"
    with serve(lambda text: 500 if text == "Which number is 20?" else SWAHILI[text]) as server:
        assert main(command(rows, "--endpoint", server.url, "--parallel", "2")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: --endpoint: {server.url}: failed 3 times: HTTP 500 Internal Server Error" in error
    assert not out.exists()
    with serve(lambda text: SWAHILI[text]) as server:
        assert main(command(rows, "--endpoint", server.url)) == 0
    printed = capsys.readouterr().out
    assert "rows     30 translated, 20 of them earlier: " in printed
    assert "written  30 rows in " in printed
    assert len(server.requests) == 20
    read = load_rows(out)
    assert [(row.id, row.prompt, row.completion, row.prompt_en, row.completion_en) for row in read] == [
        tuple(row[key] for key in ("id", "prompt", "completion", "prompt_en", "completion_en")) for row in tiny_rows(30)
    ]
    written = [path.read_bytes() for path in rows.parent.iterdir()]
    assert len(written) == 5
    assert not any(KEY.encode() in content for content in written)
    assert KEY not in printed + error
    assert main(["data", "check", str(out), "--lang", "sw"]) == 0
    assert "30 of 30 rows look good" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["nllb", "madlad"])
def test_a_local_model(rows, tmp_path, capsys, family):
    """Random translations have defects: `--keep-all` writes them, and translates nothing again."""
    model = str(save_tiny_translator(tmp_path / "model", family))
    assert main(command(rows, "--limit", "5", model=model)) == 0
    kept = load_rows(tmp_path / "pairs.translated.jsonl")
    assert [row.prompt_en for row in kept] == [row["prompt_en"] for row in tiny_rows(5)]
    report = json.loads((tmp_path / "pairs.report.json").read_text())
    assert (report["written"], len(report["left_out"])) == (0, 5)
    assert main(command(rows, "--limit", "5", "--keep-all", model=model)) == 0
    assert "rows     5 translated, 5 of them earlier" in capsys.readouterr().out
    assert (tmp_path / "pairs.jsonl").read_bytes() == (tmp_path / "pairs.translated.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "to", "message"),
    [([], "xx", "language 'xx' is unknown; nearest: xh"), ([], "en", "--to: en is the language of the rows"),
     (["--endpoint", "localhost:8000"], "sw", "--endpoint: 'localhost:8000' found; allowed: an address such as"),
     (["--out", "FOLDER/pairs.csv"], "sw", "--out: FOLDER/pairs.csv found; allowed: a file name that ends in .jsonl"),
     (["--out", "FOLDER/no/pairs.jsonl"], "sw", "--out: no folder FOLDER/no"),
     (["--out", "FOLDER/alpaca.jsonl"], "sw", "--out: FOLDER/alpaca.jsonl would replace the data that is read"),
     (["--out", "FOLDER/taken.jsonl"], "sw", "--out: FOLDER/taken.jsonl exists and was not begun by this command"),
     ([], "sw", "FOLDER/decoder: llama is no encoder-decoder; allowed: NLLB, MADLAD-400, M2M100, mBART-50, Marian"),
     (["--parallel", "0"], "sw", "Invalid value for '--parallel'")],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(rows, tmp_path, capsys, options, to, message):
    build_tiny_model().save_pretrained(tmp_path / "decoder")
    build_tiny_tokenizer().save_pretrained(tmp_path / "decoder")
    (tmp_path / "taken.jsonl").write_text("mine")
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    options = [option.replace("FOLDER", str(tmp_path)) for option in options]
    assert main(command(rows, *options, model=str(tmp_path / "decoder"), to=to)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message.replace("FOLDER", str(tmp_path)) in error[0]
    assert sorted(tmp_path.iterdir()) == before


def test_the_file_of_translated_rows_is_no_data(rows, capsys):
    source = rows.rename(rows.parent / "pairs.translated.jsonl")
    assert main(command(source, "--overwrite")) == 2
    assert f"--out: {source} would replace the data that is read" in capsys.readouterr().err
    assert len(load_rows(source, need_english=False)) == 30


def test_a_missing_file(rows, capsys):
    assert main(command(rows.with_name("alpac.jsonl"))) == 2
    assert f"alpac.jsonl: no such file; did you mean {rows}?" in capsys.readouterr().err


def test_a_mistake_before_the_first_row_does_not_refuse_the_corrected_command(rows, capsys):
    with serve(lambda text: 404) as server:
        assert main(command(rows, "--endpoint", server.url, "--limit", "2", model="caht")) == 2
        assert "HTTP 404 Not Found" in capsys.readouterr().err
    with serve(lambda text: SWAHILI[text]) as server:
        assert main(command(rows, "--endpoint", server.url, "--limit", "2")) == 0
    assert "2 translated: " in capsys.readouterr().out


def test_overwrite_begins_anew(rows, capsys):
    with serve(lambda text: SWAHILI[text]) as server:
        assert main(command(rows, "--endpoint", server.url)) == 0
        assert main(command(rows, "--endpoint", server.url, model="other")) == 2
        message = "was begun with model 'chat', found 'other'; name another file, or replace it with --overwrite"
        assert message in capsys.readouterr().err
        assert main(command(rows, "--endpoint", server.url, "--overwrite", model="other")) == 0
    assert "30 translated: " in capsys.readouterr().out
    assert server.requests[-1][2]["model"] == "other"


def test_an_endpoint_needs_no_torch(rows):
    program = (
        "import sys; from pivotune.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    with serve(lambda text: SWAHILI[text]) as server:
        words = command(rows, "--endpoint", server.url, "--limit", "2")
        finished = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
