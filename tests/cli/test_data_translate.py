from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import write_jsonl
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows
from tiny_translators import save_tiny_translator, serve
from transformers import AutoConfig, AutoModel

import pivotune.translate.chat as chat
import pivotune.translate.filters as filters
from pivotune.cli.main import main
from pivotune.data.sources import load_rows
from pivotune.translate.translators import LocalTranslator

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
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)


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
    assert main(command(rows, "--limit", "5", model=model)) == 2
    assert "every row has a defect" in capsys.readouterr().err
    kept = load_rows(tmp_path / "pairs.translated.jsonl")
    assert [row.prompt_en for row in kept] == [row["prompt_en"] for row in tiny_rows(5)]
    report = json.loads((tmp_path / "pairs.report.json").read_text())
    assert (report["written"], len(report["left_out"])) == (0, 5)
    assert main(command(rows, "--limit", "5", "--keep-all", model=model)) == 0
    assert "rows     5 translated, 5 of them earlier" in capsys.readouterr().out
    assert (tmp_path / "pairs.jsonl").read_bytes() == (tmp_path / "pairs.translated.jsonl").read_bytes()


def test_filters_leave_rows_out_and_go_on_after_a_kill(rows, tmp_path, capsys, monkeypatch):
    """One answer means something else: the model in the other direction finds it. A kill keeps all that is done."""
    english = {swahili: text for text, swahili in SWAHILI.items()}
    wrong = tiny_rows(5)[4]["completion"]
    seen: list[str] = []

    def translate_back(self, texts):
        is_killed = tiny_rows(30)[20]["prompt"] in texts and len(seen) == 32
        if is_killed:
            raise KeyboardInterrupt
        seen.extend(texts)
        return ["Bread is baked of flour and water in an oven." if text == wrong else english[text] for text in texts]

    monkeypatch.setattr(LocalTranslator, "__call__", translate_back)
    monkeypatch.setattr(filters, "embed", lambda encoder, tokenizer, texts: [np.array([1.0, 0.0]) for _ in texts])
    model, encoder = str(save_tiny_translator(tmp_path / "model", "nllb")), tmp_path / "encoder"
    build_tiny_tokenizer().save_pretrained(encoder)
    AutoModel.from_config(AutoConfig.for_model("bert", hidden_size=4, num_attention_heads=1, num_hidden_layers=1,
                                               intermediate_size=4, vocab_size=384)).save_pretrained(encoder)  # fmt: skip
    options = ["--back-translation", model, "--similarity", str(encoder)]
    with serve(lambda text: SWAHILI[text]) as server:
        assert main(command(rows, "--endpoint", server.url, *options)) == 130
    assert len(load_rows(tmp_path / "pairs.translated.jsonl")) == 30
    assert len((tmp_path / "pairs.scores.jsonl").read_text().splitlines()) == 1 + 16
    seen.append("a new process")
    capsys.readouterr()
    assert main(command(rows, "--endpoint", server.url, *options)) == 0  # which nobody asks any more
    assert len(seen) == 32 + 1 + 28
    printed = " ".join(capsys.readouterr().out.split())
    assert "row 5 sw-4: " in printed
    assert "note chrF++ of the back-translation: median 100, 5 % of the rows below 100" in printed
    assert "note similarity of the embeddings: median 1, 5 % of the rows below 1" in printed
    report = json.loads((tmp_path / "pairs.report.json").read_text())
    (left_out,) = report["left_out"]
    assert (left_out["number"], left_out["id"], left_out["reasons"]) == (5, "sw-4", ["back_translation"])
    assert left_out["back_translation"] < 30
    assert report["reasons"] == {"back_translation": "chrF++ of the back-translation below 30"}
    assert len(load_rows(tmp_path / "pairs.jsonl")) == 29
    assert main(command(rows, "--endpoint", server.url, *options, "--min-chrf", "5", "--min-similarity", "1")) == 0
    assert len(load_rows(tmp_path / "pairs.jsonl")) == 30


def test_a_chat_model_on_this_machine(rows, tmp_path):
    """Answers of a random model do not end: all lines stay English and are left out."""
    model = tmp_path / "chat"
    build_tiny_model(max_position_embeddings=1024).save_pretrained(model)
    build_tiny_tokenizer().save_pretrained(model)
    assert main(command(rows, "--limit", "2", model=str(model))) == 2
    report = json.loads((tmp_path / "pairs.report.json").read_text())
    assert [row["reasons"] for row in report["left_out"]] == [["untranslated"]] * 2


@pytest.mark.parametrize(
    ("options", "to", "message"),
    [([], "xx", "language 'xx' is unknown; nearest: xh"), ([], "en", "--to: en is the language of the rows"),
     (["--endpoint", "localhost:8000"], "sw", "--endpoint: 'localhost:8000' found; allowed: an address such as"),
     (["--out", "FOLDER/pairs.csv"], "sw", "--out: FOLDER/pairs.csv found; allowed: a file name that ends in .jsonl"),
     (["--out", "FOLDER/no/pairs.jsonl"], "sw", "--out: no folder FOLDER/no"),
     (["--out", "FOLDER/alpaca.jsonl"], "sw", "--out: FOLDER/alpaca.jsonl would replace the data that is read"),
     (["--out", "FOLDER/taken.jsonl"], "sw", "--out: FOLDER/taken.jsonl exists and was not begun by this command"),
     ([], "sw", "FOLDER/decoder: neither an encoder-decoder nor a chat model (its tokenizer has no chat template)"),
     (["--model", "FOLDER/pickled"], "sw", "FOLDER/pickled: only safetensors are read and the weights are a pickle (pyt"),
     (["--engine", "vllm"], "sw", "--engine: vllm is not installed: pip install vllm, or use --engine hf"),
     (["--tokenizer", "FOLDER/decoder"], "sw", "--tokenizer: goes with a model that was converted for CTranslate2"),
     (["--endpoint", "http://localhost:1/v1", "--revision", "main"], "sw", "--revision: is for a local model; leave it"),
     (["--min-chrf", "20"], "sw", "--min-chrf: needs --back-translation"),
     (["--min-similarity", "0.8"], "sw", "--min-similarity: needs --similarity"),
     (["--min-chrf", "101"], "sw", "Invalid value for '--min-chrf'"),
     (["--endpoint", "http://localhost:1/v1", "--back-translation", "FOLDER/pickled"], "sw", "FOLDER/pickled: only safe"),
     (["--endpoint", "http://localhost:1/v1", "--similarity", "FOLDER/decoder"], "sw", "FOLDER/decoder is no encoder;"),
     (["--parallel", "0"], "sw", "Invalid value for '--parallel'")],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(rows, tmp_path, capsys, options, to, message):
    build_tiny_model().save_pretrained(tmp_path / "decoder")
    build_tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "decoder")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
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
