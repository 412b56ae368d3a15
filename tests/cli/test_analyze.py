from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model, build_tiny_tokenizer, tiny_rows

# The second imports what reads weights before a test changes the first: it would keep the change.
import pivotune.models.loading
import pivotune.runs.execute
from pivotune.cli.main import main
from pivotune.data.examples import Encoder, Limits
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template
from pivotune.layers.layers_json import read_layers_json
from pivotune.layers.measure import analyze_layers


def save(folder: Path, **changes) -> str:
    build_tiny_model(**changes).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("start"))


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "pairs.jsonl", tiny_rows(16))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "analysis" / "layers.json"


@pytest.fixture
def never_loaded(monkeypatch) -> None:
    def load_model(*args, **kwargs):
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr(pivotune.models.loading, "load_model", load_model)


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def analyze(model: str, data: str, out: Path, *options: str) -> int:
    return main(["analyze", "--model", model, "--data", data, "--out", str(out), *options])


def refused(capsys, *arguments) -> str:
    assert analyze(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("pivotune: error: ")
    return captured.err.removeprefix("pivotune: error: ").rstrip("\n")


def test_analysis_and_picture(model, data, out, capsys):
    assert analyze(model, data, out, "--lang", "sw") == 0
    analysis = read_layers_json(out)
    assert (analysis["model"], analysis["language"], analysis["num_layers"]) == (model, "sw", NUM_LAYERS)
    assert 1 <= analysis["conversion"] < analysis["thinking"] < NUM_LAYERS
    for side in ("target", "english"):
        assert len(analysis[side]["entropy"]) == NUM_LAYERS + 1
        assert analysis[side]["sequences"] == 16
        assert analysis[side]["agreement"][-1] == 1.0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert f"saved {out} and {out.with_suffix('.png')}\n" in text
    assert f"conversion at layer {analysis['conversion']}, thinking at layer {analysis['thinking']}: " in text
    lines = [line for line in text.splitlines() if line.startswith("│ ")]
    assert len(lines) == NUM_LAYERS + 1
    for layer, line in enumerate(lines):
        assert f"{analysis['target']['entropy'][layer]:.3f}" in line
        assert ("conversion" in line) is (layer == analysis["conversion"])
        assert ("thinking" in line) is (layer == analysis["thinking"])


def test_the_numbers_are_those_of_the_library(model, data, out):
    """Rows at even distances, all tokens: what `analyze_layers` gives for them."""
    options = ["--rows", "4", "--tokens-per-row", "0", "--batch-size", "3", "--layers", "paper"]
    assert analyze(model, data, out, *options) == 0
    tokenizer = build_tiny_tokenizer()
    encoder = Encoder(tokenizer, load_template(None, tokenizer), Limits())
    pairs = encoder.encode([load_rows(data)[index] for index in (0, 4, 8, 12)])
    expected = analyze_layers(build_tiny_model(), tokenizer, pairs, tokens_per_row=None)
    analysis = read_layers_json(out)
    for side in ("target", "english"):
        assert analysis[side]["sequences"] == 4
        assert analysis[side]["tokens"] == expected[side]["tokens"]
        torch.testing.assert_close(analysis[side]["entropy"], expected[side]["entropy"], rtol=1e-4, atol=1e-4)
    assert (analysis["conversion"], analysis["thinking"]) == (expected["conversion"], expected["thinking"])


def test_fewer_tokens_of_each_row(model, data, out):
    assert analyze(model, data, out, "--tokens-per-row", "3") == 0
    assert read_layers_json(out)["target"]["tokens"] == 3 * 16


def test_json_is_all_there_is_on_stdout(model, data, out, capsys):
    assert analyze(model, data, out, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(out.read_text())
    # Progress goes to stderr, as plain text where that is no terminal: 16 rows in two languages.
    assert "32/32" in captured.err
    assert "\x1b" not in captured.err
    assert out.with_suffix(".png").is_file()


def test_the_english_side_is_optional(model, tmp_path, out, capsys):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny_rows(5)]
    assert analyze(model, write(tmp_path / "sw.jsonl", rows), out) == 0
    assert read_layers_json(out)["english"] is None
    assert "English entropy" not in capsys.readouterr().out.replace("\n", " ")


def test_english_from_a_second_file(model, tmp_path, out):
    rows = tiny_rows(5)
    target = write(tmp_path / "sw.jsonl", [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows])
    english = write(tmp_path / "en.jsonl", [{"prompt": r["prompt_en"], "completion": r["completion_en"]} for r in rows])
    both = tmp_path / "both.json"
    assert analyze(model, target, out, "--english", english) == 0
    assert analyze(model, write(tmp_path / "pairs.jsonl", rows), both) == 0
    assert read_layers_json(out)["english"] == read_layers_json(both)["english"]


@pytest.mark.usefixtures("never_loaded")
def test_what_is_there_is_kept_unless_told(model, data, tmp_path, capsys):
    out, picture = tmp_path / "layers.json", tmp_path / "layers.png"
    picture.write_bytes(b"mine")
    text = refused(capsys, model, data, out)
    assert text == f"--out: {picture} exists; add --overwrite or name another file"
    out.write_text("mine")
    assert refused(capsys, model, data, out) == f"--out: {out} exists; add --overwrite or name another file"
    assert (out.read_text(), picture.read_bytes()) == ("mine", b"mine")


def test_overwrite(model, data, out):
    out.parent.mkdir()
    for path in (out, out.with_suffix(".png")):
        path.write_text("old")
    assert analyze(model, data, out, "--overwrite") == 0
    assert read_layers_json(out)["num_layers"] == NUM_LAYERS
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("never_loaded")
def test_out_that_is_no_name_for_an_analysis(model, data, tmp_path, capsys):
    text = refused(capsys, model, data, tmp_path, "--overwrite")
    assert text == f"--out: {tmp_path} is a folder; name a file in it that ends in .json"
    text = refused(capsys, model, data, tmp_path / "layers.png")
    assert text == f"--out: {tmp_path / 'layers.png'} ends in '.png'; allowed: .json"


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "FOLDER/pair.jsonl"], "FOLDER/pair.jsonl: no such file; did you mean FOLDER/pairs.jsonl?"),
        (["--english", "FOLDER/en.jsonl"], "FOLDER/pairs.jsonl, line 1: has `prompt_en` already, but the English side"),
        (["--template", "FOLDER/mine.jinja"], "template FOLDER/mine.jinja: no {{ completion }} slot; exactly one is"),
        (["--template", "alpacca"], "--template alpacca is not chat, alpaca or an existing Jinja file"),
        (
            ["--max-tokens", "4"],
            "FOLDER/pairs.jsonl: line 1: the template alone takes more than the 4 tokens of --max-tokens; allow more",
        ),
        (
            ["--data", "FOLDER/long.jsonl", "--max-tokens", "999"],
            "FOLDER/long.jsonl: line 1: the prompt fills the model's 256 tokens and nothing is left for the answer; lower "
            "--max-tokens (it takes",
        ),
        (
            ["--data", "FOLDER/bad.jsonl"],
            "FOLDER/bad.jsonl, line 2: `completion` is missing; 1 of 2 rows is like this (mend them or leave them out)",
        ),
        (
            ["--data", "FOLDER/system.jsonl", "--template", "alpaca"],
            "FOLDER/system.jsonl: line 1: --template alpaca takes one user turn",
        ),
        (["--lang", "jp"], "--lang: 'jp' is not a language code; Japanese is ja"),
        (["--model", "FOLDER/none/there"], "FOLDER/none/there: no such folder; allowed: "),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(options, expected, model, data, tmp_path, out, capsys):
    (tmp_path / "mine.jinja").write_text("Q: {{ prompt }} A:")
    write(tmp_path / "en.jsonl", tiny_rows(16))
    write(tmp_path / "long.jsonl", [{"prompt": "namba " * 300, "completion": "moja"}])
    write(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    write(tmp_path / "system.jsonl", [{**row, "system": "jibu", "system_en": "answer"} for row in tiny_rows(2)])
    options = [word.replace("FOLDER", str(tmp_path)) for word in options]
    text = refused(capsys, model, data, out, *options)
    assert text.startswith(expected.replace("FOLDER", str(tmp_path)))
    assert not out.parent.exists()


def test_a_system_turn_is_folded(data, tmp_path, out, capsys):
    folder = save(tmp_path / "refuses")
    refuses = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    build_tiny_tokenizer(chat_template=refuses).save_pretrained(folder)
    rows = write(tmp_path / "system.jsonl", [{**row, "system": "jibu", "system_en": "answer"} for row in tiny_rows(6)])
    text = refused(capsys, folder, rows, out, "--layers", "paper")
    assert text.endswith("no system; --fold-system puts the system text before the user's")
    assert analyze(folder, rows, out, "--layers", "paper", "--fold-system", "--tokens-per-row", "0") == 0
    folded = [
        {**row, "prompt": f"jibu\n\n{row['prompt']}", "prompt_en": f"answer\n\n{row['prompt_en']}"}
        for row in tiny_rows(6)
    ]
    plain = tmp_path / "plain.json"
    written = write(tmp_path / "folded.jsonl", folded)
    assert analyze(folder, written, plain, "--layers", "paper", "--tokens-per-row", "0") == 0
    assert read_layers_json(out)["target"] == read_layers_json(plain)["target"]


@pytest.mark.usefixtures("never_loaded")
def test_a_model_with_too_few_layers(data, tmp_path, out, capsys):
    shallow = save(tmp_path / "shallow", num_hidden_layers=2)
    text = refused(capsys, shallow, data, out)
    expected = "a conversion layer and a thinking layer below the last one need at least 3"
    assert text == f"the model has 2 layers; {expected}"


@pytest.mark.usefixtures("never_loaded")
def test_an_unknown_architecture(model, data, tmp_path, out, capsys):
    folder = Path(save(tmp_path / "strange"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "opt", "architectures": ["OPTForCausalLM"]})
    )
    text = refused(capsys, str(folder), data, out)
    assert text.startswith("model type 'opt' is not supported; supported: cohere, gemma, ")
    assert "register_architecture(" in text
