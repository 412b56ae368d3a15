"""The picture of a layer sweep: lines, bars, baselines and the entropy beside them."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from pivotune.report.plots import plot_layer_sweep

ENTROPY = [5.0, 3.0, 2.0, None, 1.0]


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
    layers = {"target": {"entropy": ENTROPY}}
    return {"term": "thinking", "errors": "seeds", "series": list(all_series), "layers": layers, **changes}


@pytest.fixture
def draw(figures, tmp_path):
    """Draw, check that everything lies inside and nothing covers data, and return score panels and entropy panels."""

    def draw(content):
        path = tmp_path / "layers.png"
        plot_layer_sweep(content, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        (figure,) = figures
        assert_tidy(figure)
        twins = [axes for axes in figure.axes if axes.get_ylabel() == "mean entropy (nats)"]
        return [axes for axes in figure.axes if axes not in twins], twins

    return draw


def assert_tidy(figure):
    page = figure.bbox
    tight = [axes.get_tightbbox() for axes in figure.axes]
    for box in tight:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
    labels = [axes.yaxis.label.get_window_extent() for axes in figure.axes]
    for legend in (axes.get_legend() for axes in figure.axes):
        if legend is not None:
            assert legend.get_window_extent().x0 >= max(label.x1 for label in labels)


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_a_line_for_each_task_with_its_baseline_in_its_colour(draw):
    (axes,), (twin,) = draw(curve(series("xquad_zh", baseline=21.0), series("xquad_en")))
    found = lines(axes)
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
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*found, "entropy before training"]


def test_bars_are_as_long_as_the_margins(draw):
    (axes,), _ = draw(curve(series("xquad_zh", points=[*points(20, 24), *points(22, margin=None)])))
    bars = axes.collections[0].get_segments()
    assert [(bar[0][1], bar[1][1]) for bar in bars[:2]] == [(19.5, 20.5), (23.5, 24.5)]


@pytest.mark.parametrize(
    ("errors", "words"), [("seeds", "standard deviation over seeds"), ("items", "95 % interval over items")]
)
def test_what_the_bars_are_is_said(draw, errors, words):
    (axes,), _ = draw(curve(series("xquad_zh"), errors=errors))
    assert any(words in text.get_text() for text in axes.texts)
    assert axes.get_title(loc="left") == "Score by thinking layer"


def test_every_metric_has_a_panel_of_its_own(draw):
    panels, twins = draw(curve(series("xquad_zh"), series("xnli_zh", "accuracy"), series("heldout_zh", "nll")))
    assert [axes.get_ylabel() for axes in panels] == ["F1", "accuracy", "held-out answer NLL\n(nats per token)"]
    assert [list(lines(axes)) for axes in panels] == [["xquad_zh"], ["xnli_zh"], ["heldout_zh"]]
    assert len(twins) == 3


def test_without_a_layer_analysis_there_is_no_second_axis(draw):
    panels, twins = draw(curve(series("xquad_zh"), layers=None))
    assert (len(panels), twins) == (1, [])


def test_many_long_names_stay_inside(draw):
    (axes,), _ = draw(curve(*(series(f"xquad_zh, learning_rate={rate}e-4", baseline=20.0) for rate in range(1, 5))))
    assert len(axes.get_legend().get_texts()) == 9


def test_no_finished_cell_is_said(draw):
    (axes,), twins = draw(curve(layers=None))
    assert "no cell is finished" in [text.get_text() for text in axes.texts]
    assert twins == []
