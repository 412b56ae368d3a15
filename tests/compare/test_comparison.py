from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from result_folders import F1, LENGTH, NLL, change_results, records, write_items, write_run

from pivotune.compare.comparison import Comparison, compare_groups, difference_digits
from pivotune.compare.seed_groups import find_group, load_groups
from pivotune.compare.significance import Verdict
from pivotune.errors import UsageError
from pivotune.results.files import ITEMS

BASE = np.random.default_rng(0).random(100)


def compare(*paths: Path, **options) -> Comparison:
    warnings: list[str] = []
    groups = load_groups(list(paths), warnings)
    return compare_groups(groups, resamples=1000, warnings=warnings, **options)


def run(folder: Path, shift: float = 0.0, tasks: tuple[str, ...] = ("xquad_vi", "xquad_en"), **options) -> Path:
    """Write a run whose F1 is about `shift` above the base for every item."""
    noise = 0.05 * np.random.default_rng(len(folder.name)).standard_normal(100)
    return write_run(folder, {task: records((BASE + shift + noise).tolist()) for task in tasks}, **options)


def three_seeds(root: Path, name: str, shift: float, **options) -> None:
    for seed, wobble in enumerate((0.0, 0.01, -0.01)):
        run(root / f"{name}-{seed}", shift + wobble, seed=seed, **options)


# ---- which runs make a row ----


def test_runs_that_differ_in_seed_only_are_one_row(tmp_path):
    three_seeds(tmp_path, "tft", 0.0)
    three_seeds(tmp_path, "deep", 0.1, method="deep-supervision")
    comparison = compare(tmp_path)
    assert [(row.label, row.seeds) for row in comparison.groups] == [
        ("deep-supervision", [0, 1, 2]),
        ("tft", [0, 1, 2]),
    ]
    assert comparison.baseline == 1
    cell = comparison.table[0][0]
    assert cell is not None
    values = [figure.value for _, figure in cell.by_run]
    assert cell.value == pytest.approx(np.mean(values))
    assert cell.spread == pytest.approx(np.std(values, ddof=1))
    assert cell.difference is not None
    assert cell.difference.num_seeds == 3
    assert cell.difference.verdict is Verdict.BETTER
    assert comparison.warnings == []


def test_labels_name_what_tells_rows_apart(tmp_path):
    for name, layer in (("a", 5), ("b", 10)):
        for signal in ("logits", "feature"):
            config = {"supervision": {"thinking": {"layer": layer}, "conversion": {"signal": signal}}, "model": "m"}
            three_seeds(tmp_path, f"{name}-{signal}", 0.0, method="deep-supervision", config=config)
    three_seeds(tmp_path, "plain", 0.0)
    assert [row.label for row in compare(tmp_path).groups] == [
        "deep-supervision (conversion.signal=feature, thinking.layer=5)",
        "deep-supervision (conversion.signal=logits, thinking.layer=5)",
        "deep-supervision (conversion.signal=feature, thinking.layer=10)",
        "deep-supervision (conversion.signal=logits, thinking.layer=10)",
        "tft",
    ]


def test_single_runs_are_named_after_their_folders(tmp_path):
    run(tmp_path / "vi" / "best", config={"a": 1})
    run(tmp_path / "zh" / "best", config={"a": 2})
    run(tmp_path / "other", config={"a": 3})
    (tmp_path / "base.json").write_text((tmp_path / "other" / "results.json").read_text())
    comparison = compare(tmp_path / "vi/best", tmp_path / "zh/best", tmp_path / "other", tmp_path / "base.json")
    assert [row.label for row in comparison.groups] == ["vi/best", "zh/best", "other", "base"]


def test_a_run_given_twice_counts_once(tmp_path):
    run(tmp_path / "a")
    assert not compare(tmp_path / "a", tmp_path).warnings
    comparison = compare(tmp_path, tmp_path / "a", tmp_path / "a" / "results.json")
    assert len(comparison.groups) == 1
    assert [line.partition(":")[0] for line in comparison.warnings] == [
        str(tmp_path / "a"),
        str(tmp_path / "a" / "results.json"),
    ]


def test_copies_of_several_seeds_are_rows_of_their_own(tmp_path):
    for copy in ("a", "b"):
        three_seeds(tmp_path / copy, "tft", 0.0)
    paths = [tmp_path / copy / f"tft-{seed}" for seed in (0, 1) for copy in ("a", "b")]
    assert [group.seeds for group in load_groups(paths, [])] == [[0, 1], [0, 1]]


def test_two_runs_of_one_configuration_and_seed(tmp_path):
    run(tmp_path / "a"), run(tmp_path / "copy")
    comparison = compare(tmp_path)
    assert [row.label for row in comparison.groups] == ["a", "copy"]
    assert "have one configuration and one seed" in comparison.warnings[0]


def test_results_written_elsewhere_find_their_run(tmp_path):
    three_seeds(tmp_path / "runs", "tft", 0.0)
    for seed in range(3):
        source = run(tmp_path / "evaluated" / str(seed), seed=None)
        change_results(source, lambda content, seed=seed: content.update(model=str(tmp_path / "runs" / f"tft-{seed}")))
    (row,) = compare(tmp_path / "evaluated").groups
    assert row.seeds == [0, 1, 2]


def test_folders_are_in_their_natural_order(tmp_path):
    for layer in (20, 5, 10):
        run(tmp_path / f"layer={layer}", config={"layer": layer})
    assert [row.label for row in compare(tmp_path).groups] == ["layer=5", "layer=10", "layer=20"]


def test_unfinished_runs_are_left_out_and_named(tmp_path):
    run(tmp_path / "a")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "notes").mkdir()
    comparison = compare(tmp_path)
    assert [row.label for row in comparison.groups] == ["a"]
    assert comparison.warnings == [f"{tmp_path / 'begun'}: has no results.json yet; left out"]


def test_a_demo_folder_is_a_folder_of_runs(tmp_path):
    run(tmp_path / "tft"), run(tmp_path / "deep", 0.1, method="deep-supervision")
    (tmp_path / "results.json").write_text('{"settings": {}, "models": {}}')
    assert [row.label for row in compare(tmp_path).groups] == ["deep", "tft"]


@pytest.mark.parametrize("content", ["seed: [", "- 1\n", "seed: many\n"])
def test_a_broken_configuration_is_named_and_costs_the_seed_only(tmp_path, content):
    run(tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text(content)
    comparison = compare(tmp_path)
    assert comparison.groups[0].seeds == []
    assert comparison.groups[0].method == "tft"
    assert "config.yaml: cannot be read" in comparison.warnings[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone", "no such file or folder"), ("empty", r"no results\.json here nor in the folders in it"),
     ("run.yaml", r"expected a run folder or its results\.json, found a \.yaml file")],
)  # fmt: skip
def test_what_is_no_run(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UsageError, match=message):
        load_groups([tmp_path / name], [])


def test_finding_the_baseline(tmp_path, monkeypatch):
    three_seeds(tmp_path, "tft", 0.0)
    run(tmp_path / "deep", 0.1, method="deep-supervision")
    groups = load_groups([tmp_path], [])
    assert [group.label for group in groups] == ["deep", "tft"]
    assert find_group(groups, "deep") == 0
    assert find_group(groups, str(tmp_path / "tft-1")) == 1
    assert find_group(groups, "nothing") is None
    with pytest.raises(UsageError, match=r"holds several rows \(deep, tft\); name one of them"):
        find_group(groups, str(tmp_path))


# ---- columns ----


def test_columns_are_grouped_by_set_with_english_last(tmp_path):
    run(tmp_path / "a", tasks=("xquad_en", "xquad_vi", "mlqa_en", "xquad_ar", "mlqa_vi"))
    names = [column.task for column in compare(tmp_path / "a").columns]
    assert names == ["xquad_vi", "xquad_ar", "xquad_en", "mlqa_vi", "mlqa_en"]


def test_chosen_tasks_come_with_english(tmp_path):
    run(tmp_path / "a", tasks=("xquad_vi", "xquad_en", "mlqa_vi", "mlqa_en", "xcopa_vi"))

    def chosen(*globs: str) -> list[str]:
        return [column.task for column in compare(tmp_path / "a", tasks=globs).columns]

    assert chosen("xquad_vi") == ["xquad_vi", "xquad_en"]
    assert chosen("*_vi") == ["xquad_vi", "xquad_en", "mlqa_vi", "mlqa_en", "xcopa_vi"]
    assert chosen("xcopa_*") == ["xcopa_vi", "xquad_en", "mlqa_en"]
    with pytest.raises(
        UsageError, match=r"--tasks: nothing matches 'mkqa_\*'; the runs have: xquad_vi, xquad_en, mlqa_vi"
    ):
        chosen("xquad_vi", "mkqa_*")


def test_metrics(tmp_path):
    items = [
        {"item": str(i), "f1": v, "gold_nll": 3 * v, "gold_tokens": 2, "answer_characters": 9}
        for i, v in enumerate(BASE)
    ]
    folder = write_run(tmp_path / "a", {"xquad_vi": items, "xquad_en": items}, metrics=(F1, NLL, LENGTH))

    def chosen(*globs: str) -> list[tuple[str, str]]:
        return [(column.task, column.metric.name) for column in compare(folder, metrics=globs).columns]

    assert chosen("primary") == [("xquad_vi", "f1"), ("xquad_en", "f1")]
    assert chosen("nll_*", "primary")[::2] == [("xquad_vi", "nll_per_token"), ("xquad_vi", "f1")]
    assert len(chosen("all")) == 6
    with pytest.raises(
        UsageError, match="--metrics: nothing matches 'bleu'; the runs have: f1, nll_per_token, answer_char"
    ):
        chosen("bleu")


def test_a_metric_that_one_run_has(tmp_path):
    items = [{"item": str(i), "f1": float(v), "gold_nll": 2.0, "gold_tokens": 2} for i, v in enumerate(BASE)]
    one = write_run(tmp_path / "a", {"xquad_vi": items})
    other = write_run(tmp_path / "b", {"xquad_vi": items}, metrics=(F1, NLL), config={"b": 1})
    comparison = compare(one, other, metrics=("nll_*",))
    assert [line[0] is None for line in comparison.table] == [True, False]
    assert comparison.warnings == ["a, the baseline, does not have the task: no differences (xquad_vi)"]


def test_no_tasks_at_all(tmp_path):
    with pytest.raises(UsageError, match="no run has results of any task"):
        compare(write_run(tmp_path / "a", {}))


# ---- what is best ----


def test_best_at_the_precision_shown(tmp_path):
    for name, value in (("a", 0.50001), ("b", 0.50004), ("c", 0.4), ("d", 0.49)):
        write_run(tmp_path / name, {"t_vi": records([value] * 10)}, config={"name": name})
    comparison = compare(tmp_path)
    assert comparison.columns[0].digits == 2
    assert [line[0].best for line in comparison.table if line[0]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("found", "digits"),
    [
        ([(-1.0, 1.4, Verdict.UNDECIDED)], 1),
        ([(-0.0012, 0.0012, Verdict.UNDECIDED), (-1.0, 1.0, None)], 4),
        ([(0.03, 2.4, Verdict.BETTER)], 2),  # not [0.0, 2.4]
        ([(0.03, 2.4, Verdict.UNDECIDED)], 1),
        ([(-250.0, -130.0, Verdict.WORSE)], 0),
        ([(25.0, 25.0, Verdict.BETTER)], 7),
        ([(math.nan, math.nan, Verdict.UNDECIDED)], 7),
        ([], 7),
    ],
)
def test_decimals_of_differences(found, digits):
    assert difference_digits(found, 7) == digits


def test_lower_is_best_where_it_is_better(tmp_path):
    for name, value in (("a", 20.0), ("b", 10.0)):
        items = [
            {"item": str(i), "gold_nll": value + i, "gold_tokens": 10, "answer_characters": value} for i in range(20)
        ]
        write_run(tmp_path / name, {"t_vi": items}, metrics=(NLL, LENGTH), config={"name": name})
    comparison = compare(tmp_path, metrics=("all",))
    assert comparison.columns[0].digits == 2
    assert [[cell.best for cell in line if cell] for line in comparison.table] == [[False, False], [True, False]]
    difference = comparison.table[1][0].difference  # type: ignore[union-attr]
    assert difference is not None
    assert difference.value == pytest.approx(-1.0)
    assert difference.verdict is Verdict.BETTER
    assert comparison.table[1][1].difference.verdict is None  # type: ignore[union-attr]


def test_a_row_alone_is_best_of_nothing(tmp_path):
    comparison = compare(run(tmp_path / "a"))
    assert not any(cell.best for cell in comparison.table[0] if cell)
    assert not any(cell.difference for cell in comparison.table[0] if cell)


# ---- differences ----


def test_default_baseline(tmp_path):
    first, second = run(tmp_path / "a", method="sft"), run(tmp_path / "b", method="tft")
    assert compare(first, second).baseline == 1
    assert compare(first, run(tmp_path / "c", method="deep-supervision")).baseline == 0
    assert compare(first, second, baseline=0).baseline == 0


def test_adjusted_over_the_whole_table(tmp_path):
    run(tmp_path / "a"), run(tmp_path / "b", 0.004, config={"b": 1}), run(tmp_path / "c-", -0.3, config={"c": 1})
    comparison = compare(tmp_path)
    found = [cell.difference for line in comparison.table for cell in line if cell and cell.difference]
    assert len(found) == 4
    assert min(test.p for test in found) * 4 == pytest.approx(min(test.adjusted_p or 0 for test in found))
    assert any("not adjusted for the 4 comparisons made" in note for note in comparison.notes)


def test_shared_items_are_counted(tmp_path):
    write_run(tmp_path / "a", {"t_vi": records(BASE.tolist())})
    write_run(tmp_path / "b", {"t_vi": records((BASE[:40] + 0.1).tolist())}, config={"limit": 40})
    comparison = compare(tmp_path)
    difference = comparison.table[1][0].difference  # type: ignore[union-attr]
    assert difference is not None
    assert (difference.n, difference.value) == (40, pytest.approx(10.0))
    assert comparison.warnings == ["b and a share 40 items of 40 and 100: the difference is over these (t_vi)"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / ITEMS).unlink(), "no usable items"),
        (lambda folder: write_items(folder / ITEMS, {"t_vi": records([0.5] * 100)}), "its items give 50, not"),
        (lambda folder: write_items(folder / ITEMS, {"t_vi": [{"item": "a", "f1": [1]}]}), "made of a number"),
        (
            lambda folder: change_results(folder, lambda c: c["tasks"]["t_vi"]["metrics"]["f1"].update(scale=1.0)),
            "the runs define it differently",
        ),
    ],
)  # fmt: skip
def test_no_difference_without_trustworthy_items(tmp_path, damage, reason):
    write_run(tmp_path / "a", {"t_vi": records(BASE.tolist())})
    damage(write_run(tmp_path / "b", {"t_vi": records((BASE + 0.1).tolist())}, config={"b": 1}))
    comparison = compare(tmp_path)
    assert comparison.table[1][0].value is not None  # type: ignore[union-attr]
    assert comparison.table[1][0].difference is None  # type: ignore[union-attr]
    assert any("no difference in f1 between b and a: " in line and reason in line for line in comparison.warnings)


def test_nll_of_other_tokens_is_not_compared(tmp_path):
    for name, tokens in (("a", 10), ("b", 14)):
        items = [{"item": str(i), "gold_nll": float(i), "gold_tokens": tokens + i} for i in range(10)]
        write_run(tmp_path / name, {"t_vi": items}, metrics=(NLL,), config={"name": name})
    comparison = compare(tmp_path)
    assert comparison.table[1][0].difference is None  # type: ignore[union-attr]
    assert "item 0 has 10 and 14 gold_tokens: other rows, token limits or another tokenizer" in comparison.warnings[0]


def test_seeds_that_lack_a_task_are_named(tmp_path):
    three_seeds(tmp_path, "tft", 0.0)
    change_results(tmp_path / "tft-2", lambda content: content["tasks"].pop("xquad_vi"))
    assert compare(tmp_path).warnings[0] == "only 2 of the 3 seeds of tft have the task (xquad_vi)"


# ---- conditions and notes ----


def test_other_conditions_are_named(tmp_path):
    settings = {"limit": 40, "template": "chat"}
    for name, changes in (
        ("a", {"settings": settings, "prompt_hash": "x", "split": "test"}),
        ("b", {"settings": settings, "prompt_hash": "x", "split": "test"}),
        ("c", {"settings": {**settings, "limit": None}, "prompt_hash": "y", "split": "test"}),
    ):
        run(tmp_path / name, config={"name": name}, changes=changes)
    assert compare(tmp_path).warnings == ["limit differs between runs: 40 in a, b; none in c (xquad_vi, xquad_en)"]


def test_other_prompts_under_the_same_conditions_are_named(tmp_path):
    run(tmp_path / "a", changes={"prompt_hash": "x"})
    run(tmp_path / "b", changes={"prompt_hash": "y"}, config={"b": 1})
    assert compare(tmp_path).warnings == ["the prompts differ between runs: x in a; y in b (xquad_vi, xquad_en)"]


@pytest.mark.parametrize(
    ("prompts", "warnings"), [("x", []), ("y", ["template differs between runs: chat in a; b.jinja in b"])]
)
def test_one_template_under_two_names_is_no_other_condition(tmp_path, prompts, warnings):
    for name, template, digest in (("a", "chat", "x"), ("b", "b.jinja", prompts)):
        run(tmp_path / name, config={"name": name}, changes={"settings": {"template": template}, "prompt_hash": digest})
    assert compare(tmp_path).warnings == [f"{line} (xquad_vi, xquad_en)" for line in warnings]


def test_conditions_that_only_some_know_are_not_compared(tmp_path):
    run(tmp_path / "a", changes={"settings": {"limit": 3}})
    run(tmp_path / "b", config={"b": 1})
    assert compare(tmp_path).warnings == []


@pytest.mark.parametrize(
    ("tokens", "warned"), [((1000, 1050), False), ((1000, 1051), True), ((1000, None), False), ((None, None), False)]
)
def test_other_token_budgets_are_named(tmp_path, tokens, warned):
    for name, count in zip("ab", tokens, strict=True):
        run(tmp_path / name, config={"name": name})
        if count is not None:
            change_results(tmp_path / name, lambda content, count=count: content.update(trained={"tokens": count}))
    line = "trained tokens differ by more than 5 % between runs: 1,000 in a; 1,051 in b; data.token_budget makes them equal"
    assert compare(tmp_path).warnings == [line] * warned


def test_tasks_of_other_weights_are_named(tmp_path):
    """A run that was trained on after its first evaluation, or a checkpoint evaluated into its folder."""
    for name in ("a", "b"):
        run(tmp_path / name, config={"name": name}, changes={"model_fingerprint": name * 4})

    def mix(content):
        content["tasks"]["xquad_en"]["model_fingerprint"] = "cccc"

    assert compare(tmp_path).warnings == []
    change_results(tmp_path / "b", mix)
    found = "its tasks come from different weights (bbbb in xquad_vi; cccc in xquad_en); evaluate them again"
    assert compare(tmp_path).warnings == [f"{tmp_path / 'b' / 'results.json'}: {found}"]


def test_notes_say_what_intervals_cover(tmp_path):
    run(tmp_path / "a", tasks=("xquad_vi",)), run(tmp_path / "b", 0.1, tasks=("xquad_vi",), config={"b": 1})
    notes = " ".join(compare(tmp_path).notes)
    assert "leaves out the noise between training runs" in notes
    assert "harm to English was not measured" in notes
    assert "several seeds" not in notes
    three_seeds(tmp_path / "sweep", "tft", 0.0, tasks=("xquad_en",))
    three_seeds(tmp_path / "sweep", "sft", 0.0, tasks=("xquad_en",), method="sft")
    notes = " ".join(compare(tmp_path / "sweep").notes)
    assert "the interval covers items and seeds" in notes
    assert "English" not in notes
    assert "training runs" not in notes


def test_few_items_are_noted(tmp_path):
    write_run(tmp_path / "a", {"t_vi": records([0.0] * 3)})
    write_run(tmp_path / "b", {"t_vi": records([1.0] * 3)}, config={"b": 1})
    comparison = compare(tmp_path)
    assert comparison.table[1][0].difference.verdict is Verdict.UNDECIDED  # type: ignore[union-attr]
    assert any("1 differences are over fewer than 6 items" in note for note in comparison.notes)


def test_order_of_items_and_of_runs_changes_no_number(tmp_path):
    values = records(BASE.tolist())
    write_run(tmp_path / "a", {"t_vi": values})
    write_run(
        tmp_path / "b",
        {"t_vi": records((BASE + np.random.default_rng(3).standard_normal(100)).tolist())},
        config={"b": 1},
    )
    before = compare(tmp_path / "a", tmp_path / "b")
    write_items(tmp_path / "a" / "results.items.jsonl.gz", {"t_vi": list(reversed(values))})
    after = compare(tmp_path / "b", tmp_path / "a", baseline=1)
    assert before.table[1][0].difference == after.table[0][0].difference  # type: ignore[union-attr]


def test_broken_results_in_a_folder_of_runs_are_named(tmp_path):
    run(tmp_path / "a"), run(tmp_path / "b")
    (tmp_path / "b" / "results.json").write_text(json.dumps({"tasks": 3}))
    with pytest.raises(UsageError, match=r"b/results\.json: no results"):
        compare(tmp_path)
