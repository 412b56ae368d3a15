"""Figures: the numbers that are drawn, how series are told apart, and the files."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from pivotune.errors import UsageError
from pivotune.report.figures.base import COLOURS, save_figure, series, short_name
from pivotune.report.figures.layers import (
    entropy_comparison,
    layer_figure,
    projection_figure,
    retrieval_figure,
    sweep_figure,
)
from pivotune.report.figures.lens import lens_figures
from pivotune.report.figures.scores import (
    answer_language_figure,
    difference_figure,
    heldout_figure,
    price_figure,
    score_figure,
)
from pivotune.report.figures.training import training_figure

ENTROPY = [5.0, 3.0, 3.0, 2.5, 1.0]


def profile(entropy=ENTROPY, **changes):
    values = {
        "entropy": entropy,
        "entropy_stderr": [0.5] * 5,
        "agreement": [0.0, 0.1, 0.2, 0.5, 1.0],
        "english_share": None,
    }
    return {**values, **changes}


def layers(**changes):
    values = {
        "model": "runs/vi",
        "language": "vi",
        "num_layers": 4,
        "conversion": 1,
        "thinking": 3,
        "method": "entropy-falls",
    }
    return {**values, "target": profile(), "english": profile([4.0, 2.0, 2.0, 1.5, 0.5]), **changes}


def rows(chart, *keys: str, **wanted):
    """Return the values of these keys in the rows of the chart's data that hold them all, and `wanted`."""
    every = [row for values in chart.to_dict()["datasets"].values() for row in values]
    found = [
        row for row in every if all(key in row for key in keys) and all(row.get(k) == v for k, v in wanted.items())
    ]
    return [tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]] for row in found]


def y_titles(chart):
    """Return the titles of the panels' y axes, in one line each."""

    def titles(part):
        if (y := part.get("encoding", {}).get("y", {})).get("title"):
            yield y["title"]
        for one in part.get("layer", ()):
            yield from titles(one)

    found = [next(titles(panel), "") for panel in chart.to_dict()["vconcat"]]
    return [title if isinstance(title, str) else " ".join(title) for title in found]


# ---- layers ----


def test_entropy_of_both_languages_with_its_interval_and_the_chosen_layers():
    chart = layer_figure(layers())
    assert rows(chart, "entropy", language="vi") == ENTROPY
    assert rows(chart, "entropy", language="en") == [4.0, 2.0, 2.0, 1.5, 0.5]
    assert rows(chart, "low", language="vi")[0] == pytest.approx(5.0 - 1.96 * 0.5)
    assert rows(chart, "high", language="vi")[4] == pytest.approx(1.0 + 1.96 * 0.5)
    assert set(rows(chart, "layer", "mark")) == {(1, "i = 1"), (3, "j = 3")}
    assert rows(chart, "share", series="vi: top-1 = output's") == [0.0, 0.1, 0.2, 0.5, 1.0]
    assert rows(chart, "share", series="vi: on English tokens") == []
    assert y_titles(chart) == ["mean entropy (nats)", "share of tokens or probability"]
    assert "read from the two entropy falls" in chart.to_dict()["title"]["subtitle"]


def test_what_each_layer_can_say_is_drawn_below_without_the_embeddings():
    reading = {"conversion": [90.0, 6.0, 5.0, 4.0, 3.5], "thinking": [99.0, 8.0, 7.0, 5.0, 3.0]}
    chart = layer_figure(layers(lens="tuned", reading=reading, method="reading"))
    assert rows(chart, "nll", series="English query") == [None, 6.0, 5.0, 4.0, 3.5]
    assert rows(chart, "nll", series="English answer") == [None, 8.0, 7.0, 5.0, 3.0]
    assert chart.to_dict()["title"]["text"].startswith("Tuned-lens entropy")


def test_only_supervised_stages_are_marked():
    chart = layer_figure(layers(supervised=["thinking"]))
    assert rows(chart, "layer", "mark") == [(3, "j = 3")] * len(rows(chart, "layer", "mark"))
    assert chart.to_dict()["title"]["subtitle"].startswith("end of thinking j = 3: ")
    assert layer_figure(layers()).to_dict()["title"]["subtitle"].startswith("end of conversion i = 1, end of thinking")


@pytest.mark.parametrize(
    ("method", "said"), [("relative-depth", "no two clear entropy falls"), ("explicit", "as asked for")]
)
def test_how_the_layers_were_chosen_is_said(method, said):
    assert said in layer_figure(layers(method=method)).to_dict()["title"]["subtitle"]


def test_null_and_numbers_that_json_lacks_leave_a_gap():
    chart = layer_figure(layers(target=profile([5.0, None, float("nan"), 2.5, 1.0]), english=None))
    assert rows(chart, "entropy", language="vi") == [5.0, None, None, 2.5, 1.0]


def test_without_shares_there_is_one_panel():
    assert len(layer_figure(layers(target=profile(agreement=None), english=None)).to_dict()["vconcat"]) == 1


def test_comparison_before_and_after():
    chart = entropy_comparison(
        {"base": profile(), "TFT": profile([4.0, 2.0, 2.0, 1.0, 0.5])}, language="zh", thinking=3
    )
    assert rows(chart, "entropy", run="TFT") == [4.0, 2.0, 2.0, 1.0, 0.5]
    assert set(rows(chart, "mark")) == {"j = 3"}
    assert chart.to_dict()["title"]["subtitle"] == "language: zh"


def test_retrieval_by_layer_with_chance():
    chart = retrieval_figure({"ours": {"retrieval_accuracy": [10.0, 50.0], "chance": 2.0}})
    assert rows(chart, "accuracy") == [10.0, 50.0, 2.0]


def test_sentences_and_translations_are_joined_by_pair():
    found = {"layer": 3, "accuracy": 80.0, "pca": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]}
    chart = projection_figure({"ours": found}, "vi")
    assert rows(chart, "x", "y", "language", "pair") == [
        (0, 1, "vi", 1),
        (2, 3, "vi", 2),
        (4, 5, "en", 1),
        (6, 7, "en", 2),
    ]
    assert chart.to_dict()["vconcat"][0]["title"] == "ours: PCA at layer 3, retrieval 80.0 %"


# ---- layer sweep ----


def points(*values, margin=0.5):
    return [
        {"layer": layer, "value": value, "margin": margin, "seeds": 3} for layer, value in enumerate(values, start=1)
    ]


def line(label, metric="f1", baseline=None, **changes):
    return {
        "task": label,
        "label": label,
        "metric": metric,
        "points": points(20, 24, 22),
        "baseline": baseline,
        **changes,
    }


def curve(*all_series, **changes):
    content = {"term": "thinking", "errors": "seeds", "series": list(all_series)}
    return {**content, "layers": {"target": {"entropy": [5.0, 3.0, 2.0, None, 1.0]}}, **changes}


def test_sweep_has_a_panel_for_each_metric_and_the_entropy_below():
    chart = sweep_figure(curve(line("xquad_zh", baseline=21.0), line("xquad_en"), line("heldout_zh", "nll")))
    assert y_titles(chart) == ["F1", "held-out answer NLL (nats per token)", "mean entropy before (nats)"]
    drawn = rows(chart, "layer", "value", "low", "high", task="xquad_zh", low=19.5)
    assert drawn == [(1, 20, 19.5, 20.5)]
    assert [row for row in rows(chart, "value", "task") if row == (21.0, "xquad_zh")] == [(21.0, "xquad_zh")]
    assert rows(chart, "entropy") == [5.0, 3.0, 2.0, None, 1.0]


def test_a_baseline_has_the_colour_of_its_task():
    chart = sweep_figure(curve(line("xquad_zh", baseline=21.0), line("xquad_en"))).to_dict()
    scales = [layer["encoding"]["color"]["scale"] for layer in chart["vconcat"][0]["layer"] if "encoding" in layer]
    assert all(scale == {"domain": ["xquad_zh", "xquad_en"], "range": list(COLOURS[:2])} for scale in scales)


@pytest.mark.parametrize(
    ("errors", "words"), [("seeds", "standard deviation over seeds"), ("items", "95 % interval over items")]
)
def test_what_the_bars_are_is_said(errors, words):
    assert words in sweep_figure(curve(line("xquad_zh"), errors=errors)).to_dict()["title"]["subtitle"]


def test_no_finished_cell_is_said():
    assert rows(sweep_figure(curve(layers=None)), "text") == ["no cell is finished"]


# ---- lens ----

HOSTILE = "<script>\x00\u202e"


def read_item(**changes):
    """Return a text of 18 positions, the first two one column, in a model of one layer, as `LensReader.read` does."""
    grid = {"likeliest": [[0, 1]] * 18 + [[1, 2]] * 18, "probabilities": [0.5, 0.1] * 36, "entropy": [2.0] * 36}
    other = {**grid, "likeliest": [[0, 1]] * 18 + [[2, 1]] * 18}
    columns = [["中", 2, "query"], *[["a", 1, "query"]] * 15, [HOSTILE, 1, "answer"]]
    side = {"name": "text", "rtl": False, "columns": columns, "positions": 18, "texts": [HOSTILE, " ", "\n"]}
    side |= {"grids": [{"logit": grid}, {"logit": other}], "differences": {"logit": {"kl": [0.25] * 36}}, **changes}
    return {"sides": [side]}


def test_the_grid_has_a_cell_for_every_layer_and_token_and_breaks_between_columns():
    figures = dict(lens_figures(["one", "two"], read_item()))
    assert list(figures) == ["text-logit-model-1", "text-logit-model-2", "text-logit-difference"]
    chart = figures["text-logit-model-1"]
    assert len(set(rows(chart, "layer", "from", "token", "value"))) == 36
    assert set(rows(chart, "token", layer="0")) == {"<script>⟨U+0000⟩⟨U+202E⟩"}
    assert set(rows(chart, "token", "value", layer="1 output")) == {("␣", 0.5)}
    assert rows(chart, "from", "to", token="中") == [(0, 2)]
    domains = [panel["layer"][0]["encoding"]["x"]["scale"]["domain"] for panel in chart.to_dict()["vconcat"]]
    assert domains == [[0, 16], [16, 32]]


def test_the_difference_has_its_divergence_and_the_second_models_token():
    chart = dict(lens_figures(["one", "two"], read_item()))["text-logit-difference"]
    assert set(rows(chart, "token", "other", "value", layer="1 output")) == {("␣", "↵", 0.25)}
    assert set(rows(chart, "other", layer="0")) == {None}


def test_cells_can_have_the_colour_of_the_entropy_and_run_from_the_right():
    chart = dict(lens_figures(["one", "two"], read_item(rtl=True), "entropy"))["text-logit-model-2"]
    assert set(rows(chart, "value")) == {2.0}
    encoding = chart.to_dict()["vconcat"][0]["layer"][0]["encoding"]
    assert encoding["x"]["scale"]["reverse"]
    assert encoding["color"]["scale"]["domain"] == [0, 2.0]
    assert encoding["y"]["axis"]["orient"] == "right"


# ---- training ----

METRICS = [
    {"step": 1, "loss": 3.0, "tft_loss": 2.0, "conversion_loss": 6.0, "thinking_loss": 5.0, "grad_norm": 1.0},
    {
        "step": 2,
        "loss": 2.5,
        "tft_loss": 1.5,
        "conversion_loss": None,
        "thinking_loss": 4.0,
        "thinking_gradient_share": 0.7,
    },
    {"step": 2, "eval_target_nll": 1.4, "eval_target_loss": 9.0, "eval_target_nll_per_character": 0.3},
    {"step": 2, "eval_english_nll": 1.9, "eval_runtime": 5.0},
    {"step": 2, "train_loss": 2.75, "train_runtime": 60.0},
]


def test_training_has_a_panel_for_each_kind():
    chart = training_figure({"ours": METRICS})
    assert [title.split(" (")[0] for title in y_titles(chart)] == [
        "training loss", "inner loss", "inner gradient as a share of the task's", "held-out answer NLL",
    ]  # fmt: skip
    assert rows(chart, "step", "value", term="total") == [(1, 3.0), (2, 2.5)]
    assert rows(chart, "value", term="conversion") == [6.0, None]
    assert sorted(rows(chart, "value", term="thinking")) == [0.7, 4.0, 5.0]
    assert rows(chart, "value", term="target language") == [1.4]
    assert rows(chart, "value", term="English") == [1.9]


def test_several_runs_are_told_apart():
    chart = training_figure({"a": METRICS[:1], "b": METRICS[:1]})
    assert set(rows(chart, "series", term="total")) == {"a: total", "b: total"}


def test_terms_unknown_today_are_drawn_under_their_own_name():
    assert rows(training_figure({"a": [{"step": 1, "alignment_loss": 1.5}]}), "value", term="alignment loss") == [1.5]


@pytest.mark.parametrize("metrics", [[], [{"step": 3, "train_runtime": 1.0}], [{"loss": 1.0}]])
def test_training_without_a_logged_loss_says_so(metrics):
    assert rows(training_figure({"a": metrics}), "text") == ["no loss was logged"]


# ---- scores ----


def cell(row, task, value, found=None, **changes):
    benchmark, _, language = task.partition("_")
    difference = found and {"value": found[0], "low": found[1], "high": found[2], "verdict": "better"}
    values = {
        "row": row,
        "task": task,
        "benchmark": benchmark,
        "language": language,
        "metric": "f1",
        "higher_is_better": True,
    }
    values |= {"value": value, "stderr": 1.0, "seed_sd": None, "n": 10, "difference": difference}
    return {**values, **changes}


def test_scores_of_a_benchmark_stand_in_one_panel_with_intervals():
    chart = score_figure(
        [cell("a", "xquad_vi", 20.0), cell("a", "xquad_en", 30.0), cell("a", "xnli_vi", 40.0, stderr=None)]
    )
    assert len(chart.to_dict()["vconcat"]) == 2
    assert rows(chart, "low", "high", task="xquad_vi") == [(pytest.approx(18.04), pytest.approx(21.96))]
    assert rows(chart, "low", task="xnli_vi") == [None]


def test_over_seeds_the_bar_is_the_standard_deviation():
    assert rows(score_figure([cell("a", "xquad_vi", 20.0, stderr=None, seed_sd=2.0)]), "low", "high") == [(18.0, 22.0)]


def test_differences_are_those_of_the_comparison():
    chart = difference_figure([cell("a", "xquad_vi", 20.0), cell("b", "xquad_vi", 23.0, (3.0, 1.0, 5.0))], "a")
    assert rows(chart, "run", "difference", "low", "high") == [("b", 3.0, 1.0, 5.0)]


def test_price_is_turned_so_that_better_is_up_and_right():
    cells = [
        cell("b", "heldout_vi", 1.0, (-0.5, -0.7, -0.3), higher_is_better=False),
        cell("b", "heldout_en", 2.0, (0.1, 0.0, 0.2), higher_is_better=False),
    ]
    chart = price_figure(cells, "a")
    assert rows(chart, "english", "low", "high") == [(-0.1, -0.2, 0.0)]
    assert rows(chart, "target", "below", "above") == [(0.5, 0.3, 0.7)]


def test_shares_of_answers_stay_within_their_bounds():
    cells = [cell("a", "xquad_vi", 99.0, metric="in_language"), cell("a", "xquad_vi", 1.0, metric="empty_answers")]
    chart = answer_language_figure(cells)
    assert rows(chart, "value", "high", metric="in_language") == [(99.0, 100)]
    assert rows(chart, "value", "low", metric="empty_answers") == [(1.0, 0)]


def test_heldout_bars_and_paired_differences():
    results = {"TFT": {"vi": 1.211, "en": None}, "ours": {"vi": 1.1, "en": 1.0}}
    paired = {"vi": {"value": -0.1, "low": -0.3, "high": 0.05}, "en": {"value": None, "low": None, "high": None}}
    chart = heldout_figure(results, errors={"TFT": {"vi": 0.1}}, differences=paired, difference="ours\nminus TFT")
    assert rows(chart, "label", run="TFT") == ["1.21", "n/a"]
    assert rows(chart, "low", "high", run="TFT")[0] == (pytest.approx(1.211 - 0.196), pytest.approx(1.211 + 0.196))
    assert set(rows(chart, "label", "low", language="vi", value=-0.1)) == {("-0.100", -0.3)}
    assert y_titles(chart)[1] == "ours minus TFT (paired, 95 %)"


# ---- series and files ----


def test_every_series_differs_in_more_than_colour():
    encodings = {
        name: channel.to_dict()["scale"]["range"] for name, channel in series("run", map(str, range(12))).items()
    }
    assert len(set(zip(encodings["color"], encodings["shape"], strict=True))) == 12
    assert encodings["strokeDash"][0] != encodings["strokeDash"][7]
    assert len(set(encodings["shape"][:7])) == 7


def test_long_names_keep_their_ends():
    assert short_name("/x" * 90) == "…x" + "/x" * 14
    assert len(short_name("/x" * 90)) == 30


@pytest.mark.parametrize(("name", "begin"), [("a.svg", b"<svg"), ("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")])
def test_files_by_suffix(tmp_path, name, begin):
    path = tmp_path / "new" / name
    save_figure(training_figure({"ours": METRICS}), path)
    content = path.read_bytes()
    assert content.startswith(begin)
    if name == "a.svg":
        text = " ".join(ElementTree.fromstring(content.decode()).itertext())
        assert "optimizer step" in text


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a\.gif: \.gif is not allowed; allowed: \.png, \.svg, \.pdf"):
        save_figure(training_figure({}), tmp_path / "a.gif")


def test_neither_torch_nor_transformers_is_imported():
    modules = "pivotune.report, pivotune.report.page, pivotune.report.figures.scores, pivotune.report.figures.training"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
