"""`python -m benchmarks.step` and `.cross_entropy` on the tiny shape: what they write, and wrong options."""

from __future__ import annotations

import json

import pytest

from benchmarks import cross_entropy, step
from pivotune.errors import UsageError


def run(program, path, *arguments: str) -> dict[str, dict]:
    program.main(
        ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--threads", "1", "--out", str(path), *arguments]
    )
    return {row["what"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.filterwarnings("ignore")
def test_step_measures_every_goal_of_a_step(tmp_path):
    rows = run(step, tmp_path / "step.json", "--batch", "3", "--lengths", "mixed", "--replay", "1")
    assert {what.split(":")[0].strip() for what in rows} >= {"1", "2", "3", "4", "5", "7", "9"}
    gradients = next(row for what, row in rows.items() if what.startswith("9"))
    assert 0 < gradients["ratio"] < 1e-5
    assert all(row["ratio"] > 0 for row in rows.values())


def test_cross_entropy_compares_gradients_in_the_same_run(tmp_path):
    rows = run(cross_entropy, tmp_path / "cross_entropy.json", "--tokens", "64")
    gradients = [row["ratio"] for what, row in rows.items() if "gradient" in what]
    assert gradients
    assert max(gradients) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "2", "--replay", "2"], "--replay: 2 found; allowed: 0 to 1"),
        (["--replay", "-1"], "--replay: -1 found; allowed: 0 to 1"),
        (["--layers", "1"], "--layers: 1 found; allowed: 3 or more"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        run(step, tmp_path / "step.json", *arguments)


def test_ideal_ratio_counts_products_of_real_lengths():
    """By hand for one row: blocks see the English query up to layer 1 and the answer up to layer 2; heads both."""
    from benchmarks.common import build_model

    model = build_model("tiny")
    row = step.Lengths(query=10, answer=20, english_query=5, english_answer=7)
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    tft = 6 * block * 4 * 30 + 6 * head * 20
    extra = 6 * block * (1 * 5 + 2 * 7) + 4 * head * 12
    assert step.ideal_ratio(model, [row], [row], step._supervisions(4)["logits"]) == pytest.approx(1 + extra / tft)
