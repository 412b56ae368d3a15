"""Figures: the data drawn, that all of it lies inside, and that odd names and gaps do no harm."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pivotune.report.plots import (
    plot_entropy,
    plot_entropy_comparison,
    plot_layer_sweep,
    plot_metric_bars,
    plot_training,
)

ENTROPY = [5.0, 3.0, 3.0, 2.5, 1.0]


def profile(entropy=ENTROPY, **changes):
    values = {
        "num_layers": 4,
        "tokens": 9,
        "sequences": 2,
        "entropy": entropy,
        "entropy_stderr": [0.5] * len(entropy),
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
        "target": profile(),
        "english": profile([4.0, 2.0, 2.0, 1.5, 0.5]),
    }
    return {**values, **changes}


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw into a new folder, check what every picture must satisfy, and return the panels."""
    figures = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        save(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(function, *args, **kwargs):
        path = tmp_path / "new" / "picture.png"
        function(*args, path, **kwargs)
        (figure,) = figures
        assert path.read_bytes().startswith(b"\x89PNG")
        assert_all_inside(figure)
        return figure.axes

    return draw


def assert_all_inside(figure):
    """No text is cut off by the border, no legend covers data or the labels of an axis."""
    page = figure.bbox
    right = max(axes.yaxis.label.get_window_extent().x1 for axes in figure.axes)
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            assert legend.get_window_extent().x0 >= max(axes.get_window_extent().x1, right)
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        boxes = [text.get_window_extent() for text in texts if text.get_text()] + (
            [legend.get_window_extent()] if legend else []
        )
        for box in (axes.get_tightbbox(), *boxes):
            assert box.x0 >= -1
            assert box.y0 >= -1
            assert box.x1 <= page.x1 + 1
            assert box.y1 <= page.y1 + 1


def curves(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def all_texts(axes):
    return [text.get_text() for text in axes.texts]


def test_entropy_of_both_languages_with_the_chosen_layers(draw):
    upper, lower = draw(plot_entropy, layers())
    drawn = curves(upper)
    assert drawn["vi"] == ENTROPY
    assert drawn["en"] == [4.0, 2.0, 2.0, 1.5, 0.5]
    places = {line.get_label(): set(line.get_xdata()) for line in upper.lines}
    assert places["end of conversion: i = 1"] == {1}
    assert places["end of thinking: j = 3"] == {3}
    assert {"i = 1", "j = 3", "i and j: read from the two entropy falls"} <= set(all_texts(upper))
    assert upper.get_ylabel() == "mean entropy (nats)"
    assert curves(lower)["vi: top-1 = output's"] == [0.0, 0.1, 0.2, 0.5, 1.0]
    assert "vi: on English tokens" not in curves(lower)
    assert lower.get_xlabel().startswith("layer k")


def test_what_each_layer_can_say_is_drawn_below(draw):
    reading = {"conversion": [90.0, 6.0, 5.0, 4.0, 3.5], "thinking": [99.0, 8.0, 7.0, 5.0, 3.0], "tokens": {}}
    upper, _, lowest = draw(plot_entropy, {**layers(), "lens": "tuned", "reading": reading, "method": "reading"})
    drawn = curves(lowest)
    assert drawn["English query"][1:] == reading["conversion"][1:]
    assert drawn["English answer"][1:] == reading["thinking"][1:]
    assert math.isnan(drawn["English query"][0])
    assert upper.get_title(loc="left").startswith("Tuned-lens entropy")
    assert "i and j: by the English text that each layer can say" in all_texts(upper)


def test_band_is_the_95_percent_interval(draw):
    upper, _ = draw(plot_entropy, layers(english=None))
    (band,) = upper.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(5.0 + 1.96 * 0.5)
    assert heights.min() == pytest.approx(1.0 - 1.96 * 0.5)


def test_english_share_is_drawn_where_it_could_be_told(draw):
    share = [0.9, 0.8, 0.7, 0.3, 0.1]
    _, lower = draw(plot_entropy, layers(target=profile(english_share=share), english=None))
    assert curves(lower)["vi: on English tokens"] == share


def test_without_shares_there_is_one_panel(draw):
    bare = profile(agreement=None, entropy_stderr=None)
    (axes,) = draw(plot_entropy, layers(target=bare, english=None))
    assert axes.get_xlabel().startswith("layer k")


@pytest.mark.parametrize(
    ("method", "said"), [("relative-depth", "no two clear entropy falls"), ("explicit", "as asked for")]
)
def test_how_the_layers_were_chosen_is_said(draw, method, said):
    upper, _ = draw(plot_entropy, layers(method=method))
    assert any(said in text for text in all_texts(upper))


def test_null_leaves_a_gap(draw):
    upper, _ = draw(plot_entropy, layers(target=profile([5.0, None, 3.0, 2.5, 1.0]), english=None))
    values = curves(upper)["vi"]
    assert math.isnan(values[1])
    assert values[2] == 3.0


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("多语言/模型", "the model"),
        ("نموذج", "the model"),
        ("a\nb", "the model"),
        ("", "the model"),
        ("a$b$c", r"a\$b\$c"),
        ("_hidden", "_hidden"),
        ("/x" * 90, "…x" + "/x" * 17),
        ("AN-ORGANISATION/MODEL-7B-INSTRUCT-GPTQ-V2", "…ANISATION/MODEL-7B-INSTRUCT-GPTQ-V2"),
    ],
)
def test_model_names_that_the_font_lacks_or_reads_otherwise(draw, model, shown):
    upper, _ = draw(plot_entropy, layers(model=model))
    assert upper.get_title(loc="left").split(": ")[1].strip() == shown


@pytest.mark.parametrize("language", ["中文", "العربية", "हिन्दी", "zh", None])
def test_languages_that_the_font_lacks(draw, language):
    upper, _ = draw(plot_entropy, layers(language=language))
    assert legend_texts(upper)[0] == ("zh" if language == "zh" else "target")


def test_series_whose_name_would_be_hidden_is_in_the_legend(draw):
    (axes,) = draw(plot_entropy_comparison, {"_baseline": profile()})
    assert legend_texts(axes) == [" _baseline"]


def test_names_in_latin_script_with_marks_are_kept(draw):
    upper, _ = draw(plot_entropy, layers(language="Tiếng Việt"))
    assert legend_texts(upper)[0] == "Tiếng Việt"


def test_close_layers_have_their_names_side_by_side(draw):
    upper, _ = draw(plot_entropy, layers(conversion=2, thinking=3))
    first, second = (text.get_window_extent() for text in upper.texts if text.get_text() in ("i = 2", "j = 3"))
    assert first.x1 <= second.x0


def test_comparison(draw):
    profiles = {"base": profile(), "TFT": profile([4.0, 2.0, 2.0, 1.0, 0.5]), "模型": profile([1.0] * 5)}
    (axes,) = draw(plot_entropy_comparison, profiles, language="zh", conversion=1, thinking=3)
    assert list(curves(axes)) == ["base", "TFT", "model 3", "end of conversion: i = 1", "end of thinking: j = 3"]
    assert curves(axes)["TFT"] == [4.0, 2.0, 2.0, 1.0, 0.5]
    assert "language: zh" in all_texts(axes)


def test_comparison_without_marks(draw):
    (axes,) = draw(plot_entropy_comparison, {"base": profile()})
    assert list(curves(axes)) == ["base"]
    assert all_texts(axes) == []


def test_many_series_are_told_apart_without_colour(draw):
    (axes,) = draw(plot_entropy_comparison, {f"run {n}": profile() for n in range(12)})
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == 12
    assert len({line.get_marker() for line in axes.lines[:7]}) == 7


METRICS = [
    {"step": 1, "loss": 3.0, "tft_loss": 2.0, "conversion_loss": 6.0, "thinking_loss": 5.0, "grad_norm": 1.0},
    {"step": 2, "loss": 2.5, "tft_loss": 1.5, "conversion_loss": None, "thinking_loss": 4.0, "learning_rate": 0.1},
    {"step": 2, "eval_target_nll": 1.4, "eval_target_loss": 9.0, "eval_target_nll_per_character": 0.3},
    {"step": 2, "eval_english_nll": 1.9, "eval_runtime": 5.0},
    {"step": 2, "train_loss": 2.75, "train_runtime": 60.0},
]


def test_training_has_a_panel_for_each_kind_of_loss(draw):
    training, inner, heldout = draw(plot_training, METRICS)
    assert curves(training) == {"total": [3.0, 2.5], "answer (TFT)": [2.0, 1.5]}
    assert curves(inner)["thinking"] == [5.0, 4.0]
    assert curves(inner)["conversion"][0] == 6.0
    assert math.isnan(curves(inner)["conversion"][1])
    assert curves(heldout) == {"target language": [1.4], "English": [1.9]}
    assert list(heldout.lines[0].get_xdata()) == [2]
    assert heldout.get_xlabel() == "optimizer step"
    assert "nats per token" in training.get_ylabel()


def test_training_shows_only_the_kinds_there_are(draw):
    (axes,) = draw(plot_training, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert curves(axes) == {"total": [2.0, 1.0]}


def test_terms_unknown_today_are_drawn_under_their_own_name(draw):
    (axes,) = draw(plot_training, [{"step": 1, "loss": 2.0, "alignment_loss": 1.5}])
    assert curves(axes)["alignment loss"] == [1.5]


def test_plain_evaluation_loss_stands_in_for_a_missing_likelihood(draw):
    _, heldout = draw(plot_training, [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.5}])
    assert curves(heldout) == {"held-out": [1.5]}


@pytest.mark.parametrize("metrics", [[], [{"step": 3, "train_runtime": 1.0}], [{"loss": 1.0}]])
def test_training_without_a_logged_loss_says_so(draw, metrics):
    (axes,) = draw(plot_training, metrics)
    assert all_texts(axes) == ["no loss was logged"]


def test_bars(draw):
    results = {"base": {"vi": 2.154, "en": 1.906}, "TFT": {"vi": 1.211, "en": None}}
    (axes,) = draw(plot_metric_bars, results, errors={"base": {"vi": 0.1, "en": 0.2}})
    heights = [patch.get_height() for patch in axes.patches]
    assert heights[:3] == [2.154, 1.906, 1.211]
    assert math.isnan(heights[3])
    assert all_texts(axes)[:4] == ["2.15", "1.91", "1.21", "n/a"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["vi", "en"]
    assert legend_texts(axes) == ["base", "TFT"]
    assert axes.get_ylim()[0] == 0.0
    base, tft = axes.patches[0], axes.patches[2]
    assert base.get_x() + base.get_width() <= tft.get_x()
    (segments,) = (collection.get_segments() for collection in axes.collections)
    assert segments[0][:, 1].tolist() == pytest.approx([2.154 - 0.196, 2.154 + 0.196])


def test_paired_differences_stand_below_the_bars(draw):
    results = {"TFT": {"vi": 1.2, "en": 1.0}, "ours": {"vi": 1.1, "en": 1.0}}
    paired = {"vi": {"value": -0.1, "low": -0.3, "high": 0.05}, "en": {"value": None, "low": None, "high": None}}
    axes, below = draw(plot_metric_bars, results, differences=paired, difference="ours minus TFT")
    assert [text.strip() for text in all_texts(below)] == ["-0.100", "n/a"]
    assert "ours minus TFT" in below.get_ylabel()
    assert axes.get_xlabel() == ""
    assert below.get_xlabel() == "language of question and answer"
    segments = [segment.tolist() for collection in below.collections for segment in collection.get_segments()]
    assert [[0.0, pytest.approx(-0.3)], [0.0, pytest.approx(0.05)]] in segments


def test_bars_under_names_that_the_font_lacks(draw):
    (axes,) = draw(plot_metric_bars, {"模型": {"المقياس": 1.0}})
    assert legend_texts(axes) == ["method 1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["language 1"]


# ---- layer sweep ----


def points(*values, margin=0.5):
    return [
        {"layer": layer, "value": value, "margin": margin, "seeds": 3} for layer, value in enumerate(values, start=1)
    ]


def series(label, metric="f1", baseline=None, **changes):
    return {
        "task": label,
        "label": label,
        "metric": metric,
        "points": points(20, 24, 22),
        "baseline": baseline,
        **changes,
    }


def curve(*all_series, **changes):
    layers = {"target": {"entropy": [5.0, 3.0, 2.0, None, 1.0]}}
    return {"term": "thinking", "errors": "seeds", "series": list(all_series), "layers": layers, **changes}


def draw_sweep(draw, content):
    """Return score panels and entropy panels."""
    panels = draw(plot_layer_sweep, content)
    twins = [axes for axes in panels if axes.get_ylabel() == "mean entropy (nats)"]
    return [axes for axes in panels if axes not in twins], twins


def test_a_line_for_each_task_with_its_baseline_in_its_colour(draw):
    (axes,), (twin,) = draw_sweep(draw, curve(series("xquad_zh", baseline=21.0), series("xquad_en")))
    found = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert set(found) == {"xquad_zh", "xquad_en", "TFT: xquad_zh"}
    assert list(found["xquad_zh"].get_xdata()) == [1, 2, 3]
    assert list(found["xquad_zh"].get_ydata()) == [20, 24, 22]
    assert set(found["TFT: xquad_zh"].get_ydata()) == {21.0}
    colours = {name: to_hex(line.get_color()) for name, line in found.items()}
    assert colours["xquad_zh"] == colours["TFT: xquad_zh"] != colours["xquad_en"]
    assert axes.get_ylabel() == "F1"
    assert axes.get_xlabel() == "thinking layer (after k blocks)"
    assert list(twin.get_lines()[0].get_ydata())[:3] == [5.0, 3.0, 2.0]
    assert list(twin.get_lines()[0].get_xdata()) == [0, 1, 2, 3, 4]
    assert twin.get_ylim()[0] == 0
    assert legend_texts(axes) == [*found, "entropy before training"]


def test_bars_are_as_long_as_the_margins(draw):
    (axes,), _ = draw_sweep(draw, curve(series("xquad_zh", points=[*points(20, 24), *points(22, margin=None)])))
    bars = axes.collections[0].get_segments()
    assert [(bar[0][1], bar[1][1]) for bar in bars[:2]] == [(19.5, 20.5), (23.5, 24.5)]


@pytest.mark.parametrize(
    ("errors", "words"), [("seeds", "standard deviation over seeds"), ("items", "95 % interval over items")]
)
def test_what_the_bars_are_is_said(draw, errors, words):
    (axes,), _ = draw_sweep(draw, curve(series("xquad_zh"), errors=errors))
    assert any(words in text for text in all_texts(axes))
    assert axes.get_title(loc="left") == "Score by thinking layer"


def test_every_metric_has_a_panel_of_its_own(draw):
    panels, twins = draw_sweep(
        draw, curve(series("xquad_zh"), series("xnli_zh", "accuracy"), series("heldout_zh", "nll"))
    )
    assert [axes.get_ylabel() for axes in panels] == ["F1", "accuracy", "held-out answer NLL\n(nats per token)"]
    assert [list(curves(axes)) for axes in panels] == [["xquad_zh"], ["xnli_zh"], ["heldout_zh"]]
    assert len(twins) == 3


def test_without_a_layer_analysis_there_is_no_second_axis(draw):
    panels, twins = draw_sweep(draw, curve(series("xquad_zh"), layers=None))
    assert (len(panels), twins) == (1, [])


def test_many_long_names_stay_inside(draw):
    (axes,), _ = draw_sweep(
        draw, curve(*(series(f"xquad_zh, learning_rate={rate}e-4", baseline=20.0) for rate in range(1, 5)))
    )
    assert len(legend_texts(axes)) == 9


def test_no_finished_cell_is_said(draw):
    (axes,), twins = draw_sweep(draw, curve(layers=None))
    assert "no cell is finished" in all_texts(axes)
    assert twins == []


# ---- files ----


def test_vector_files_by_suffix(tmp_path):
    path = tmp_path / "picture.svg"
    plot_training(METRICS, path)
    assert "<svg" in path.read_text(encoding="utf-8")


def test_nothing_global_and_no_torch():
    code = "import sys, pivotune.report.plots; sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
