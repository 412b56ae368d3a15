from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from result_folders import F1, LENGTH, NLL, records, write_run
from rich.console import Console

from pivotune.compare.comparison import Comparison, compare_groups
from pivotune.compare.formats import render, render_terminal, to_dict
from pivotune.compare.seed_groups import load_groups

SIGNS = "a_b & 50% {x} $y$ #1 ~^\\ <b>|`*"


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    """Compare two runs and a base model on two languages; all items differ equally, so that no number is random."""
    for name, method, seed, vi, en in (
        ("base", None, None, 0.25, 0.75),
        ("tft", "tft", 0, 0.5, 0.5),
        ("deep", "ds", 0, 0.75, 0.5),
    ):
        offsets = [0.1, -0.1] * 5
        tasks = {"xquad_vi": records([vi + o for o in offsets]), "xquad_en": records([en + o for o in offsets])}
        write_run(tmp_path / name, tasks, method=method, seed=seed)
    groups = load_groups([tmp_path / name for name in ("base", "tft", "deep")], [])
    return compare_groups(groups, resamples=1000, warnings=["something differs"])


@pytest.fixture
def over_seeds(tmp_path) -> Comparison:
    random = np.random.default_rng(0)
    base = random.random(50)
    for method, shift in (("tft", 0.0), ("deep-supervision", 0.4)):
        for seed in range(3):
            values = base + shift + 0.01 * random.standard_normal() + 0.01 * random.standard_normal(50)
            write_run(tmp_path / f"{method}-{seed}", {"xnli_zh": records(values.tolist())}, method=method, seed=seed)
    return compare_groups(load_groups([tmp_path], []), resamples=1000)


def renamed(comparison: Comparison, label: str) -> Comparison:
    groups = [replace(group, label=label) for group in comparison.groups[:1]] + list(comparison.groups[1:])
    return replace(comparison, groups=groups, warnings=[label])


def terminal(comparison: Comparison, width: int = 100, **options) -> str:
    console = Console(width=width, file=io.StringIO(), **options)
    for part in render_terminal(comparison, width):
        console.print(part)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def test_markdown(comparison):
    assert render(comparison, "markdown").startswith(
        """\
| method | xquad vi<br>f1 ↑, n 10 | xquad en<br>f1 ↑, n 10 |
|---|---:|---:|
| base | 25.0 ± 3.3<br>-25.0 [-25.0, -25.0] ▼@ | **75.0 ± 3.3**<br>+25.0 [25.0, 25.0] ▲@ |
| tft (baseline) | 50.0 ± 3.3 | 50.0 ± 3.3 |
| deep | **75.0 ± 3.3**<br>+25.0 [25.0, 25.0] ▲@ | 50.0 ± 3.3<br>+0.0 [0.0, 0.0] ≈@ |

**Warning:** something differs

± is the standard error over items. Bold: best of the column.

▲ better, ▼ worse, ≈ not told apart.

Differences are to tft, with 95 % intervals. A method""".replace("@", "<br>training noise left out")
    )


def test_latex(comparison):
    text = render(comparison, "latex")
    assert text.startswith(
        r"""% warning: something differs
% needs \usepackage{booktabs}
\begin{table}
\centering
\small
\begin{tabular}{lrr}
\toprule
 & \multicolumn{2}{c}{xquad (f1 $\uparrow$)} \\
\cmidrule(lr){2-3}
method & vi & en \\
 & n 10 & n 10 \\
\midrule
base & 25.0 $\pm$ 3.3 & \textbf{75.0 $\pm$ 3.3} \\
 & {\footnotesize $-25.0~[-25.0,~-25.0]^{-}$} & {\footnotesize $+25.0~[25.0,~25.0]^{+}$} \\
 & {\footnotesize training noise left out} & {\footnotesize training noise left out} \\
\addlinespace
tft (baseline) & 50.0 $\pm$ 3.3 & 50.0 $\pm$ 3.3 \\
\addlinespace
deep & \textbf{75.0 $\pm$ 3.3} & 50.0 $\pm$ 3.3 \\
 & {\footnotesize $+25.0~[25.0,~25.0]^{+}$} & {\footnotesize $+0.0~[0.0,~0.0]$} \\
 & {\footnotesize training noise left out} & {\footnotesize training noise left out} \\
\bottomrule
\end{tabular}
\caption{$\pm$ is the standard error over items. Bold: best of the column. $^{+}$ better, $^{-}$ worse; no mark"""
    )
    assert "95 \\%" in text
    assert text.endswith("\\end{table}\n")


def test_terminal(comparison):
    lines = terminal(comparison).splitlines()
    assert lines[0] == "xquad  f1 ↑"
    assert lines[2].split() == ["vi", "en"]
    assert lines[3].split() == ["n", "10", "n", "10"]
    assert [line for line in lines[5:15] if line] == [
        " base                    25.0 ± 3.3                75.0 ± 3.3",
        "             -25.0 [-25.0, -25.0] ▼      +25.0 [25.0, 25.0] ▲",
        "            training noise left out   training noise left out",
        " tft                     50.0 ± 3.3                50.0 ± 3.3",
        " baseline",
        " deep                    75.0 ± 3.3                50.0 ± 3.3",
        "               +25.0 [25.0, 25.0] ▲         +0.0 [0.0, 0.0] ≈",
        "            training noise left out   training noise left out",
    ]
    assert "warning: something differs" in lines


def test_terminal_marks_best_and_verdicts_by_style(comparison):
    text = terminal(comparison, force_terminal=True, color_system="standard")
    assert "\x1b[1m75.0 ± 3.3" in text
    assert "\x1b[1m50.0 ± 3.3" not in text
    assert re.search("\x1b\\[32m *\\+25.0", text)
    assert re.search("\x1b\\[31m *-25.0", text)


def test_narrow_terminals_split_and_never_cut(comparison):
    for width in (40, 60, 100):
        text = terminal(comparison, width)
        assert text.count("xquad  f1 ↑") == (1 if width == 100 else 2)
        assert "…" not in text
        assert "-25.0 [-25.0, -25.0] ▼" in text
        assert max(map(len, text.splitlines())) <= width


def test_the_table_says_that_one_run_against_one_leaves_out_training_noise(comparison):
    for text in (terminal(comparison), render(comparison, "markdown"), render(comparison, "latex")):
        assert text.count("training noise left out") == 4
    lines = csv.DictReader(io.StringIO(render(comparison, "csv")))
    assert {line["covers"] for line in lines if line["difference"]} == {"items"}


def test_several_seeds_are_shown(over_seeds):
    cell = over_seeds.table[0][0]
    shown = f"{cell.value:.2f} ± {cell.spread:.2f}"
    assert 0.1 <= cell.spread < 1
    for text in (terminal(over_seeds), render(over_seeds, "markdown").replace("\\", "")):
        assert shown in text
        assert "3 seeds" in text
        assert "training noise left out" not in text
    assert "training noise left out" not in render(over_seeds, "latex")


def test_csv_has_a_line_for_every_run_task_and_metric(over_seeds):
    lines = list(csv.DictReader(io.StringIO(render(over_seeds, "csv"))))
    assert [(line["row"], line["kind"], line["seeds"]) for line in lines] == [
        (label, kind, seeds)
        for label in ("deep-supervision", "tft")
        for kind, seeds in (("seeds", "0 1 2"), ("seed", "0"), ("seed", "1"), ("seed", "2"))
    ]
    mean, *members = lines[:4]
    assert float(mean["value"]) == pytest.approx(np.mean([float(line["value"]) for line in members]))
    assert float(mean["seed_sd"]) == pytest.approx(np.std([float(line["value"]) for line in members], ddof=1))
    assert (mean["stderr"], mean["verdict"], mean["test"]) == ("", "better", "two-sample")
    assert mean["covers"] == "items and seeds"
    assert float(mean["degrees"]) == pytest.approx(4, rel=0.1)
    assert float(mean["low"]) < float(mean["difference"]) < float(mean["high"])
    assert float(members[0]["stderr"]) > 0
    assert lines[4]["difference"] == ""


def test_json_holds_everything(comparison):
    content = json.loads(render(comparison, "json"), parse_constant=pytest.fail)
    assert content == json.loads(json.dumps(to_dict(comparison)))
    assert (content["baseline"], content["resamples"], content["seed"], content["confidence"]) == ("tft", 1000, 0, 0.95)
    assert [row["label"] for row in content["rows"]] == ["base", "tft", "deep"]
    assert content["warnings"] == ["something differs"]
    (cell,) = [cell for cell in content["cells"] if (cell["row"], cell["task"]) == ("deep", "xquad_vi")]
    assert cell["best"] is True
    assert cell["difference"]["verdict"] == "better"
    assert cell["difference"]["covers"] == "items"
    assert cell["difference"]["value"] == pytest.approx(25)


@pytest.mark.parametrize("form", ["markdown", "latex", "csv", "json"])
def test_one_item_gives_no_interval_and_valid_files(tmp_path, form):
    for name, value in (("tft", 0.5), ("other", 1.0)):
        write_run(tmp_path / name, {"t_vi": records([value])}, method=name)
    text = render(compare_groups(load_groups([tmp_path], []), resamples=1000), form)
    assert "nan" not in text.lower()
    assert math.isfinite(float(re.search(r"50(\.0+)?", text).group()))  # type: ignore[union-attr]


def test_figures_have_two_digits_of_their_uncertainty(tmp_path):
    """A difference of 0.004 nats per character and an F1 of 29.6 each have the digits that their interval supports."""
    random = np.random.default_rng(0)
    scores, nll = random.random(400), 1 + 0.3 * random.random(400)
    for name, gain in (("tft", 0.0), ("deep", 0.004)):
        better = nll - gain + 0.002 * random.standard_normal(400)
        values = zip(scores, better, strict=True)
        items = [
            {"item": str(i), "f1": f1, "gold_nll": 100 * one, "gold_tokens": 100} for i, (f1, one) in enumerate(values)
        ]
        write_run(tmp_path / name, {"t_vi": items}, method=name, metrics=(F1, NLL))
    text = render(compare_groups(load_groups([tmp_path], []), metrics=("all",), resamples=1000), "markdown")
    assert re.search(r"\| \**\d\d\.\d ± 1\.\d\**", text)
    assert re.search(r"\d\.\d{4} ± 0\.00\d\d\**<br>-0\.0\d{4} \[-0\.0\d{4}, -0\.0\d{4}\] ▲", text)


def test_rows_without_a_task_have_a_dash(tmp_path):
    write_run(tmp_path / "a", {"t_vi": records([0.5] * 8), "t_en": records([0.5] * 8)})
    write_run(tmp_path / "b", {"t_vi": records([0.5] * 6)}, config={"b": 1})
    comparison = compare_groups(load_groups([tmp_path], []), resamples=1000)
    text = render(comparison, "markdown")
    cells = "50.00 ± 0.00<br>+0.00 [0.00, 0.00] ≈<br>training noise left out | – |"
    assert f"| b | {cells}" in text.replace("**", "")
    assert "t vi<br>f1 ↑, n 6-8" in text
    assert "n 6--8" in render(comparison, "latex")


def test_a_metric_without_direction_has_no_arrow_mark_or_legend(tmp_path):
    for name, value in (("a", 3), ("b", 9)):
        items = [{"item": str(i), "answer_characters": value} for i in range(9)]
        write_run(tmp_path / name, {"t_vi": items}, metrics=(LENGTH,), config={"name": name})
    text = render(compare_groups(load_groups([tmp_path], []), resamples=1000), "markdown")
    assert "answer\\_characters, n 9" in text
    assert "+6.000 [6.000, 6.000]<br>training noise left out |" in text
    assert "▲" not in text


def test_markdown_is_escaped(comparison):
    text = render(renamed(comparison, SIGNS + "\nnext"), "markdown")
    row = text.splitlines()[2]
    assert row.startswith(r"| a\_b \& 50% {x} \$y\$ \#1 \~^\\ \<b\>\|\`\* next | ")
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_latex_is_escaped(comparison):
    text = render(renamed(comparison, SIGNS + "\nnext"), "latex")
    row = next(line for line in text.splitlines() if "25.0 $" in line)
    assert row.startswith(
        r"a\_b \& 50\% \{x\} \$y\$ \#1 \textasciitilde{}\textasciicircum{}\textbackslash{} "
        r"\textless{}b\textgreater{}|`* next & "
    )
    # A line end in a name must not end the comment.
    assert text.splitlines()[0] == f"% warning: {SIGNS} next"


def test_csv_is_escaped(comparison):
    lines = list(csv.DictReader(io.StringIO(render(renamed(comparison, 'a,"b"\nc'), "csv"))))
    assert lines[0]["row"] == 'a,"b"\nc'


def test_names_in_the_terminal_are_made_harmless(comparison):
    wild = renamed(comparison, "[red]x[/]\x1b[2J")
    console = Console(width=100, file=io.StringIO())
    for part in render_terminal(wild, 100):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/]␛[2J" in text
    assert "\x1b" not in text
