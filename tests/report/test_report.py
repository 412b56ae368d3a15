"""`pivotune report`: sections, missing parts, and size of the page."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from planted import call, refused
from result_folders import F1, write_run

from pivotune.report.page import Figure, Table
from pivotune.report.report import PAGES, report_sections
from pivotune.report.runs import read_material


def items(shift: float, count: int = 40, **texts: str):
    rows = [{"item": f"q{n:03d}", "f1": min(1.0, (n % 5) / 8 + shift), **texts} for n in range(count)]
    return [{**row, "answer": f"answer {row['item']}"} for row in rows]


def sections_of(*paths: Path, **options):
    return {section.title: section for section in report_sections(read_material(list(paths), **options))}


def text_of(section) -> str:
    """Return all text of a section's blocks."""
    return json.dumps([repr(block) for block in section.blocks], ensure_ascii=False)


@pytest.fixture
def two_runs(tmp_path) -> Path:
    """Return a folder with TFT and a run that is 20 points better in Vietnamese and the same in English."""
    for method, shift in (("tft", 0.0), ("deep-supervision", 0.2)):
        tasks = {"xquad_vi": items(shift), "xquad_en": items(0.0)}
        write_run(tmp_path / method, tasks, method=method, config={"data": {"train": "vi.jsonl", "language": "vi"}})
    return tmp_path


def test_the_summary_names_real_differences_and_the_price_in_english(two_runs):
    text = text_of(sections_of(two_runs)["Summary"])
    assert "2 runs of owner/base, fine-tuned for vi with deep-supervision, tft." in text
    assert "deep-supervision is better than tft on xquad_vi" in text
    assert "+20" in text
    assert "1 of 1 difference cannot be told apart from zero" in text


def test_several_sources_and_one_loss_are_named(tmp_path):
    data = {"train": [{"path": "a b.jsonl", "weight": 2}, "c.jsonl"], "language": "vi"}
    supervision = {"conversion": {"signal": "none"}, "thinking": {"signal": "logits"}}
    write_run(tmp_path / "run", {"xquad_vi": items(0.0)}, config={"data": data, "supervision": supervision})
    profile = {
        "conversion": 3,
        "thinking": 20,
        "num_layers": 30,
        "method": "reading",
        "model": "m",
        "target": {"entropy": [4.0] * 31, "num_layers": 30, "tokens": 9, "sequences": 2},
    }
    (tmp_path / "run" / "layers.json").write_text(json.dumps({"version": 1, "reason": "", **profile}))
    found = sections_of(tmp_path / "run")
    assert "'a b.jsonl, c.jsonl'" in text_of(found["Summary"])
    assert "'j = 20 of 30'" in text_of(found["Summary"])
    assert "pivotune data check 'a b.jsonl' c.jsonl --lang vi" in text_of(found["Data"])


def test_an_analysis_without_entropy_draws_no_layers(tmp_path):
    write_run(tmp_path / "run", {"xquad_vi": items(0.0)})
    marks = {"conversion": 3, "thinking": 20, "num_layers": 30, "method": "reading", "model": "m", "reason": ""}
    for target in ({"entropy": []}, []):
        (tmp_path / "run" / "layers.json").write_text(json.dumps({"version": 1, **marks, "target": target}))
        assert "Layers" not in sections_of(tmp_path / "run")


def test_a_worse_run_is_named_too(two_runs):
    text = text_of(sections_of(two_runs, baseline="deep-supervision")["Summary"])
    assert "tft is worse than deep-supervision on xquad_vi" in text


def test_change_against_the_starting_model_is_paired(tmp_path):
    rows = [{"item": n, "nll": 10.0 + n % 3, "base_nll": 12.0 + n % 3, "tokens": 10} for n in range(30)]
    run = tmp_path / "tft"
    run.mkdir()
    nll = {"form": "ratio", "fields": ["nll", "tokens"], "higher_is_better": False}
    entry = {"metric": "nll", "value": 1.1, "stderr": 0.1, "n": 30, "language": "vi", "base": {"value": 1.3}}
    entry["metrics"] = {"nll": {"value": 1.1, "stderr": 0.1, "n": 30, **nll}}
    (run / "results.json").write_text(json.dumps({"model": "m", "method": "tft", "tasks": {"heldout_vi": entry}}))
    with gzip.open(run / "results.items.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"task": "heldout_vi", **row}) + "\n" for row in rows)
    table = next(b for b in sections_of(run)["Summary"].blocks if isinstance(b, Table) and "Held-out" in b.caption)
    assert table.rows[0][:4] == ["tft", "vi", "1.300", "1.100"]
    assert table.rows[0][4] == "-0.200 [-0.200, -0.200]"


def test_parts_that_are_missing_are_named(two_runs):
    (two_runs / "tft" / "results.items.jsonl.gz").unlink()
    (two_runs / "tft" / "config.yaml").write_text("a: [")
    begun = two_runs / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    text = text_of(sections_of(two_runs)["Summary"])
    for line in (
        "tft: results.items.jsonl.gz: not there",
        "tft: config.yaml: cannot be read",
        "tft: metrics.jsonl: not there (pivotune train writes it)",
        "begun: results.json: not there (pivotune train and pivotune evaluate write it)",
        "begun: environment.json: not there",
    ):
        assert line in text


def test_a_run_that_only_began_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    sections = sections_of(tmp_path)
    assert list(sections) == ["Summary", "Training", "How to reproduce"]


def test_every_page_is_used_and_there_are_figures_for_all_of_them(two_runs):
    run = two_runs / "tft"
    profile = {"entropy": [2.0, 1.0], "agreement": [0.0, 1.0]}
    layers = {"model": "m", "num_layers": 1, "conversion": 0, "thinking": 1, "method": "explicit", "target": profile}
    (run / "layers.json").write_text(json.dumps(layers))
    (run / "layers-after.json").write_text(json.dumps(layers))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / "environment.json").write_text('{"python": "3.11", "libraries": {"torch": "2.13"}, "command": ["pivotune"]}')
    histograms = {"lengths": {"prompt": {"edges": [1, 10, 100], "counts": [1, 1]}}}
    for name, total in (("tft", 2), ("deep-supervision", 3)):
        check = {"verdict": "good", "total": total, "usable": 2, "histograms": histograms}
        (two_runs / name / "data-check.json").write_text(json.dumps(check))
    sections = sections_of(two_runs)
    # The two runs are neither an ablation nor a layer sweep.
    assert len(sections) == len(PAGES) - 2
    names = [block.name for section in sections.values() for block in section.blocks if isinstance(block, Figure)]
    assert names[:6] == ["scores", "differences", "price-in-english", "layers-1", "layers-after", "training"]
    assert names[6:] == ["data-lengths", "data-lengths-2"]
    assert "2.13" in text_of(sections["Environment"])
    assert "pivotune train" in text_of(sections["How to reproduce"])


def test_differing_settings_are_listed_and_equal_ones_are_not(two_runs):
    table = sections_of(two_runs)["Configuration"].blocks[0]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["method"]
    assert table.rows[0][1:] == ["deep-supervision", "tft"]


def test_samples_stand_side_by_side(two_runs):
    content = sections_of(two_runs)["Sample answers"].data["samples"]
    assert content["runs"] == ["deep-supervision", "tft"]
    item, _, _, answers = content["tasks"]["xquad_vi"][1]
    assert item == "q001"
    assert answers == [["answer q001", 0.325, 0], ["answer q001", 0.125, 0]]


# ---- sweeps ----


def supervised(folder: Path, name: str, shift: float, *, method="deep-supervision", **terms) -> Path:
    """Write a run whose settings under `supervision` differ from the defaults in `terms`: `conversion="logits"`."""
    signals = {"conversion": "none", "thinking": "logits", **terms}
    supervision = {term: {"signal": signals[term], "layer": "auto"} for term in ("conversion", "thinking")}
    supervision["thinking"]["layer"] = terms.get("layer", "auto")
    supervision["lens"] = terms.get("lens", "tuned")
    config = {"data": {"train": "vi.jsonl", "language": terms.get("language", "vi")}, "supervision": supervision}
    return write_run(folder / name, {"xquad_vi": items(shift)}, method=method, config=config)


def test_an_ablation_is_one_table_of_variants_against_tft(tmp_path):
    both = supervised(tmp_path, "a", 0.3, conversion="logits")
    supervised(tmp_path, "b", 0.2)
    supervised(tmp_path, "c", 0.0, method="tft")
    supervised(tmp_path, "d", 0.1, conversion="logits", thinking="none")
    supervised(tmp_path, "other", 0.1, language="zh")
    (table,) = (block for block in sections_of(tmp_path)["Ablation"].blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == [
        "TFT (baseline)",
        "conversion.signal=logits, thinking.signal=none",
        "conversion.signal=none, thinking.signal=logits",
        "conversion.signal=logits, thinking.signal=logits",
    ]
    assert "<strong>55.0 ± " in table.rows[3][1]
    assert "+30.0 [" in table.rows[3][1]
    assert table.caption.startswith("Difference to TFT")
    assert "Ablation" in sections_of(tmp_path / "b", tmp_path / "c", both)
    assert "Ablation" not in sections_of(tmp_path / "c", both)
    assert "Ablation" not in sections_of(both, tmp_path / "other")


def test_lenses_and_layers_name_the_rows_of_an_ablation(tmp_path):
    for lens, layer in (("tuned", 2), ("logit", 2), ("logit", 3)):
        supervised(tmp_path, f"{lens}{layer}", 0.1, lens=lens, layer=layer)
    (table,) = (block for block in sections_of(tmp_path)["Ablation"].blocks if isinstance(block, Table))
    assert {row[0] for row in table.rows} == {
        "lens=tuned, thinking.layer=2",
        "lens=logit, thinking.layer=2 (baseline)",
        "lens=logit, thinking.layer=3",
    }
    assert "Ablation" not in sections_of(tmp_path / "logit2", tmp_path / "logit3")


def test_runs_that_differ_in_a_layer_have_a_layer_sweep(tmp_path):
    for layer in (2, 3):
        supervised(tmp_path, f"layer={layer}", layer / 10, layer=layer)
    supervised(tmp_path, "tft", 0.0, method="tft")
    (figure,) = sections_of(tmp_path)["Layer sweep"].blocks
    assert isinstance(figure, Figure)
    assert figure.name == "layer-sweep"
    assert [row[:4] for row in figure.table.rows] == [["xquad_vi", "f1", 2, "45"], ["xquad_vi", "f1", 3, "55"]]
    assert [row[6] for row in figure.table.rows] == ["25", "25"]
    assert "a dashed line is TFT" in figure.caption
    assert "Layer sweep" not in sections_of(tmp_path / "layer=2", tmp_path / "tft")


# ---- the command ----


def test_the_page_and_the_figures_are_written(two_runs, tmp_path, capsys):
    out, folder = tmp_path / "new" / "report.html", tmp_path / "figures"
    code, printed, _ = call(capsys, "report", two_runs, "--out", out, "--figures", folder)
    assert (code, printed) == (0, f"saved {out} and 9 files in {folder}\n")
    names = ("scores", "differences", "price-in-english")
    assert {path.name for path in folder.iterdir()} == {
        name + end for name in names for end in (".png", ".svg", ".pdf")
    }
    assert "<h1" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--out", "FOLDER/page.pdf"], "--out: FOLDER/page.pdf ends in '.pdf'; allowed: .html"),
        (
            ["--out", "FOLDER/old.html/page.html"],
            "--out: FOLDER/old.html/page.html cannot be written (Not a directory)",
        ),
        (["--out", "FOLDER/old.html"], "--out: FOLDER/old.html exists; add --overwrite or name another file"),
        (["--figures", "FOLDER/old.html"], "--figures: FOLDER/old.html is a file; name a folder"),
        (["--baseline", "none", "--out", "FOLDER/p.html"], "--baseline: none is no row of the report; the rows are: "),
    ],
)
def test_mistakes_are_one_line(two_runs, capsys, options, expected):
    (two_runs / "old.html").write_text("old")
    options = [option.replace("FOLDER", str(two_runs)) for option in options]
    assert refused(capsys, "report", two_runs, *options).startswith(expected.replace("FOLDER", str(two_runs)))


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert "neither a run folder nor a folder of run folders" in refused(
        capsys, "report", tmp_path, "--out", tmp_path / "a.html"
    )
    assert "no such file or folder" in refused(capsys, "report", tmp_path / "no", "--out", tmp_path / "a.html")


@pytest.mark.slow
def test_twelve_runs_of_ten_tasks_stay_under_ten_megabytes(tmp_path, capsys):
    generator = random.Random(0)
    words = [f"{generator.randrange(10**6):x}" for _ in range(3000)]

    def text(count: int) -> str:
        return " ".join(generator.choice(words) for _ in range(count))

    languages = ("vi", "zh", "ar", "sw", "en")
    tasks = [f"{benchmark}_{language}" for benchmark in ("xquad", "mlqa") for language in languages]
    questions = {task: [(text(40), text(4)) for _ in range(500)] for task in tasks}
    for run in range(12):
        found = {
            task: [
                {"item": f"q{n}", "f1": generator.random(), "answer": text(8), "question": question, "gold": gold}
                for n, (question, gold) in enumerate(asked)
            ]
            for task, asked in questions.items()
        }
        write_run(tmp_path / f"run{run}", found, metrics=(F1,), method=f"method{run}", config={"run": run})
    assert call(capsys, "report", tmp_path, "--out", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 10_000_000
    samples = re.search(r'id="samples">([^<]+)<', page)
    assert samples is not None
    content = json.loads(gzip.decompress(base64.b64decode(samples[1])))
    assert sum(len(answers) for asked in content["tasks"].values() for *_, answers in asked) == 12 * 10 * 500


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, pivotune.report.report; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
