"""Text from data, models, configurations and file names stays text: it drives no terminal, page or table."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt
from planted import CONTROLS, HOSTILE, call, copy, refused, resume, write_yaml
from result_folders import records, write_run
from tiny_training import tiny_rows, write_rows

from pivotune.cli.common import safe, stdout
from pivotune.cli.main import main
from pivotune.config.yaml_text import parse_config
from pivotune.report.figures.base import save_figure
from pivotune.report.figures.layers import entropy_comparison
from pivotune.report.figures.scores import heldout_figure
from pivotune.report.report import render_report, report_sections
from pivotune.report.runs import read_material
from pivotune.runs.model_card import model_card
from pivotune.text.escaping import csv_text, latex, markdown, printable, printable_json

# What a file name may hold: everything but a slash.
FILE_NAME = HOSTILE.replace("/", "∕")


def harmless(text: str) -> bool:
    return not any(control in text for control in CONTROLS)


@pytest.fixture
def hostile_model(base, tmp_path) -> Path:
    return copy(base, tmp_path / FILE_NAME)


# ---- the terminal ----


def test_hostile_rows_and_names_in_training(hostile_model, tmp_path, capsys):
    rows = [{name: f"{text} {HOSTILE}" for name, text in row.items()} for row in tiny_rows(8)]
    data = {"train": write_rows(tmp_path / f"{FILE_NAME}.jsonl", rows), "validation": 2, "language": "sw"}
    path = write_yaml(
        tmp_path, model=str(hostile_model), data=data, method="tft", output_dir=str(tmp_path / f"r{FILE_NAME}")
    )
    code, out, err = call(capsys, "train", path, "--set", "training.max_steps=1")
    assert code == 0, err
    assert harmless(out + err)
    assert "[bold red]x" in out
    assert "␛[31m" in out


def test_log_messages_are_harmless_lines(stopped, tmp_path, capsys):
    """Names of a planted file are shown in a warning; the library by itself installs no handler."""
    run = copy(stopped / "run", tmp_path / "run")
    planted = copy(run / "checkpoint-2", run / "checkpoint-3") / "checksums.json"
    token = "hf_" + "a" * 30
    planted.write_text(
        json.dumps(
            {name: {"size": 1, "sha256": ""} for name in (f"{HOSTILE}\npivotune: error: {token}", "trainer_state.json")}
        ),
        encoding="utf-8",
    )
    code, out, err = call(capsys, *resume(stopped, tmp_path))
    assert code == 0, err
    assert harmless(out + err)
    (line,) = (line for line in err.splitlines() if "checkpoint-3 is damaged and passed over" in line)
    assert line.endswith("pivotune: error: <redacted> is missing")
    assert "␛[31m" in line
    logger = logging.getLogger("pivotune")
    assert (logger.handlers, logger.propagate) == ([], True)


def test_hostile_names_in_chat_and_analysis(hostile_model, rows, tmp_path, capsys):
    code, out, err = call(capsys, "chat", hostile_model, "--prompt", HOSTILE, "--max-new-tokens", 2)
    assert code == 0, err
    assert harmless(out + err)
    out_file = tmp_path / f"out{FILE_NAME}.json"
    code, out, err = call(capsys, "analyze", "--model", hostile_model, "--data", rows, "--rows", 2, "--out", out_file)
    assert code == 0, err
    assert harmless(out + err)
    assert "[bold red]" in out


def test_models_that_answer_with_controls(base, monkeypatch, capsys):
    from pivotune.cli.chat import Chatter

    def answer(self, prompt, on_text=None):
        if on_text:
            on_text(HOSTILE)
        return HOSTILE

    monkeypatch.setattr(Chatter, "answer", answer)
    code, out, _ = call(capsys, "chat", base, "--prompt", "x")
    assert code == 0
    assert harmless(out)
    assert "␛[31m" in out
    code, out, _ = call(capsys, "chat", base, "--prompt", "x", "--json")
    assert harmless(out)
    assert json.loads(out)["answers"] == {str(base): HOSTILE}


@pytest.mark.parametrize(
    "words",
    [
        ["train", f"{FILE_NAME}.yaml"],
        ["chat", FILE_NAME],
        ["compare", FILE_NAME],
        ["data", "check", f"{FILE_NAME}.jsonl", "--lang", "vi"],
        ["analyze", "--model", FILE_NAME, "--data", "x.jsonl"],
        ["evaluate", FILE_NAME, "--tasks", "xquad_de"],
    ],
)
def test_hostile_names_in_errors(words, capsys):
    message = refused(capsys, *words)
    assert harmless(message)
    assert "␛[31m" in message


@pytest.mark.parametrize("change", [f"data.on_bad_row='{FILE_NAME}'", f"{FILE_NAME}=1", f"training.{FILE_NAME}=1"])
def test_hostile_values_in_errors(change, base, rows, tmp_path, capsys):
    path = write_yaml(tmp_path, model=str(base), data={"train": str(rows), "validation": 2})
    assert harmless(refused(capsys, "train", path, "--set", change))


def test_words_that_typer_refuses(capsys):
    assert main(["train", "x.yaml", f"--{FILE_NAME}"]) == 2
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)
    assert captured.err


def test_markup_is_not_obeyed(capsys):
    stdout.print(f"[bold]x[/] {safe(HOSTILE)}", soft_wrap=True)
    assert "[bold red]x[/] [/nobody]" in capsys.readouterr().out


def test_json_keeps_its_meaning():
    content = {HOSTILE: [HOSTILE, "größer", "العربية", "\u200d"]}
    text = printable_json(json.dumps(content, ensure_ascii=False, indent=2))
    assert json.loads(text) == content
    assert harmless(text)
    assert "العربية" in text


def test_texts_of_all_languages_stay():
    text = "Xin chào\tالعربية עברית हिन्दी 日本語\n👩‍👩‍👧"
    assert printable(text) == text


# ---- documents ----


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def test_model_card_of_a_hostile_run():
    settings = {
        "model": f"{HOSTILE}\n# heading\n<img src=x onerror=alert(1)>",
        "data": {"train": "rows ``` \n```\n<script>alert(1)</script>", "language": "vi-Latn"},
        "training": {"run_name": "````"},
        "output_dir": "run",
    }
    task = {"n": 3, "value": 1.0, "stderr": 0.1, "nll_per_character": 0.5,
            "base": {"value": 2.0, "stderr": 0.1, "nll_per_character": 1.0}}  # fmt: skip
    layers = {"conversion": 1, "thinking": 2, "num_layers": 4, "reason": f"because\n\n# {HOSTILE}"}
    card = model_card(parse_config(settings), layers, {"tasks": {f"heldout_{HOSTILE} | a | b": task}})
    assert harmless(card)
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["tags"] == ["pivotune", "deep-supervision"]
    assert metadata["language"][0] == settings["data"]["language"]
    html = rendered(body)
    assert "<script" not in html
    assert "<img" not in html
    assert re.findall("<h.>(.*?)</h.>", html)[1:] == ["Layers", "Data", "Results", "How to use", "Configuration"]
    assert html.count("<pre>") == 2
    assert html.count("<td>") == 6


@pytest.fixture
def comparison(tmp_path) -> list[Path]:
    """Two runs in folders and with tasks of hostile names."""
    for name, shift in (("=cmd|' ∕C calc'!A0", 0), (f"+{FILE_NAME}", 1)):
        values = [float((index + shift) % 3) for index in range(6)]
        write_run(tmp_path / name, {f"{HOSTILE}_vi": records(values)}, method=f"@{HOSTILE}{shift}", seed=None)
    return [path for path in sorted(tmp_path.iterdir()) if path.is_dir()]


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "csv", "json"])
def test_comparisons_of_hostile_runs(form, comparison, tmp_path, capsys):
    code, out, err = call(capsys, "compare", *comparison, "--format", form, "--resamples", 1000)
    assert code == 0, err
    assert harmless(out + err)
    if form == "markdown":
        html = rendered(out)
        assert "<script" not in html
        assert html.count("<td") == 4
    if form == "latex":
        assert r"\$\textasciicircum{}\&\%\{\}\textbackslash{}" in out
        assert not re.search(r"(?<!\\)[&%#_]<script", out)
    if form == "csv":
        for line in csv.DictReader(io.StringIO(out)):
            assert line["row"].startswith("'")
            assert line["method"].startswith("'@")
            assert float(line["value"]) >= 0
            # Numbers stay numbers, also negative ones.
            assert not line["difference"] or float(line["difference"]) == pytest.approx(float(line["difference"]))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_formulas_are_text(text):
    assert csv_text(text) == f"'{text}"
    assert csv_text(-1.5) == -1.5
    assert csv_text("a=1") == "a=1"


def test_one_line_in_every_form():
    for escape in (markdown, latex):
        text = escape("a\n\nb\x85c\u2028d\x1b")
        assert "\n" not in text
        assert harmless(text)


# ---- pictures ----


@pytest.mark.parametrize("name", ["_hidden", HOSTILE, "a\x00b", "datum.x[0]", "a.b", "'"])
def test_hostile_names_in_pictures(name, tmp_path):
    """Neither read as an expression nor as markup, nor left out of the legend."""
    save_figure(heldout_figure({name: {name: 1.0}, "other": {name: 2.0}}), tmp_path / "bars.svg")
    svg = (tmp_path / "bars.svg").read_text()
    assert "<script" not in svg
    assert not any(control in svg for control in CONTROLS)
    ElementTree.fromstring(svg)
    profile = {"entropy": [1.0, 2.0], "entropy_stderr": [0.1, 0.1]}
    save_figure(entropy_comparison({name: profile}, language=name), tmp_path / "entropy.png")


# ---- pages ----


def test_report_of_hostile_runs(tmp_path):
    """No element, attribute or script of the page comes from the data."""
    texts = {"answer": f"{HOSTILE}</script><img src=x onerror=alert(1)>", "question": HOSTILE, "gold": HOSTILE}
    config = {"data": {"train": f"</script><script>{HOSTILE}", "language": "vi"}}
    write_run(tmp_path / f"<b>{FILE_NAME}", {"xquad_vi": [{**r, **texts} for r in records([0.5] * 3)]}, config=config)
    page = render_report(report_sections(read_material([tmp_path])), HOSTILE)
    assert not any(control in page for control in CONTROLS)
    # Behind our own scripts' digests the policy allows none; the data adds neither elements nor attributes.
    outside = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert "<script>|" not in outside
    assert not re.search(r"<(img|b)\b|\son\w+=", outside.replace("&lt;", ""))
