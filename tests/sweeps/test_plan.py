"""Turn grids, seeds and ablations into cells, each once, with safe and stable names."""

from __future__ import annotations

import pytest
import yaml

from pivotune.config.yaml_text import load_config
from pivotune.errors import UsageError
from pivotune.sweeps.plan import ablation_axis, parse_grid, parse_seeds, plan_cells

SETTINGS = {"model": "m", "data": {"train": "pairs.jsonl"}, "output_dir": "run", "seed": 7}


@pytest.fixture
def config(tmp_path):
    return write(tmp_path)


def write(folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}), encoding="utf-8")
    return path


def plan(config, *grid, seeds=(), changes=(), axes=()):
    return plan_cells(config, changes, [*parse_grid(grid), *axes], seeds=seeds, folder=config.parent / "sweep")


def names(cells):
    return [cell.name for cell in cells]


def test_every_combination_with_every_seed_first_seed_first(config):
    cells = plan(config, "supervision.thinking.layer=5,10", "training.learning_rate=1e-4,2e-5", seeds=[0, 3])
    grid = [(layer, rate) for layer in (5, 10) for rate in ("1e-4", "2e-5")]
    assert names(cells) == [
        f"thinking.layer={layer},learning_rate={rate},seed={seed}" for seed in (0, 3) for layer, rate in grid
    ]
    found = [(c.config.seed, c.config.supervision.thinking.layer, c.config.training["learning_rate"]) for c in cells]
    assert found == [(seed, layer, float(rate)) for seed in (0, 3) for layer, rate in grid]
    assert [cell.config.output_dir for cell in cells] == [str(config.parent / "sweep" / cell.name) for cell in cells]


def test_english_is_kept_by_every_method_with_replay(config):
    grid = ("method=tft,english-only", "supervision.keep_english.kl=0.1,0.2", "supervision.profile_rows=3,4")
    assert names(plan(config, *grid)) == [
        "method=tft,keep_english.kl=0.1,seed=7",
        "method=tft,keep_english.kl=0.2,seed=7",
        "method=english-only,seed=7",
    ]


def test_shares_of_cross_lingual_rows_belong_to_that_method(config):
    grid = ("method=tft,cross-lingual", "cross_lingual.translations=0,0.5")
    assert names(plan(config, *grid)) == [
        "method=tft,seed=7",
        "method=cross-lingual,cross_lingual.translations=0,seed=7",
        "method=cross-lingual,cross_lingual.translations=0.5,seed=7",
    ]


def test_weights_of_sdrrl_belong_to_that_method(config):
    assert names(plan(config, "method=tft,sdrrl", "sdrrl.completion=0,1", "data.english_ratio=0,0.5")) == [
        "method=tft,english_ratio=0,seed=7",
        "method=tft,english_ratio=0.5,seed=7",
        "method=sdrrl,sdrrl.completion=0,seed=7",
        "method=sdrrl,sdrrl.completion=1,seed=7",
    ]


def test_seed_of_the_configuration_where_none_is_given(config):
    (cell,) = plan(config, "method=tft")
    assert (cell.name, cell.seed) == ("method=tft,seed=7", 7)
    (changed,) = plan(config, "method=tft", changes=["seed=4"])
    assert changed.seed == 4


def test_changes_are_in_all_cells_and_the_grid_is_stronger(config):
    changes = ["supervision.conversion.layer=1", "supervision.thinking.layer=9"]
    cells = plan(config, "supervision.thinking.layer=5,6", changes=changes)
    assert {cell.config.supervision.conversion.layer for cell in cells} == {1}
    assert [cell.config.supervision.thinking.layer for cell in cells] == [5, 6]


def test_a_cell_is_what_its_configuration_would_be_by_hand(config):
    (cell,) = plan(config, "supervision.thinking.layer=5")
    by_hand = load_config(config, ["supervision.thinking.layer=5", f"output_dir={cell.folder}"])
    assert cell.config == by_hand


def test_tft_has_no_layer_so_it_is_there_once(config):
    cells = plan(config, "method=tft,deep-supervision", "supervision.thinking.layer=5,10", seeds=[0])
    assert names(cells) == [
        "method=tft,seed=0",
        "method=deep-supervision,thinking.layer=5,seed=0",
        "method=deep-supervision,thinking.layer=10,seed=0",
    ]


def test_tft_is_not_refused_for_layers_that_it_does_not_use(config):
    changes = ["supervision.conversion.layer=6"]
    assert names(plan(config, "method=tft", "supervision.thinking.layer=5,7", changes=changes)) == ["method=tft,seed=7"]
    with pytest.raises(
        UsageError, match=r"conversion\.layer: 6 is not below .*thinking\.layer: 5.*cell thinking\.layer=5"
    ):
        plan(config, "supervision.thinking.layer=5,7", changes=changes)


@pytest.mark.parametrize(
    ("switch", "unused", "used"),
    [
        ("supervision.thinking.signal=none", "supervision.thinking.layer=5,10", "supervision.conversion.layer=2,3"),
        (
            "supervision.conversion.signal=none",
            "supervision.conversion.weight=0.1,1",
            "supervision.thinking.weight=0.1,1",
        ),
        ("method=sft", "data.english_ratio=0,0.5", "data.limit=10,20"),
        ("method=tft", "supervision.schedule=linear,constant", "data.english_ratio=0,0.5"),
        (
            "method=deep-supervision",
            "supervision.feature.pooling=mean,last",
            "supervision.logits.forward=shared,separate",
        ),
    ],
)
def test_keys_that_a_cell_does_not_use_make_no_cells(config, switch, unused, used):
    changes = ["supervision.conversion.weight=0.2"]
    assert len(plan(config, switch, unused, changes=changes)) == 1
    assert len(plan(config, switch, used, changes=changes)) == 2


def test_a_key_of_conversion_turns_it_on(config):
    cells = plan(config, "supervision.conversion.layer=2,3")
    assert [(c.config.supervision.conversion.signal, c.config.supervision.conversion.layer) for c in cells] == [
        ("logits", 2),
        ("logits", 3),
    ]
    assert plan(config)[0].config.supervision.conversion.signal == "none"


def test_values_may_hold_commas_within_brackets_and_quotes(config):
    grid = "supervision.feature={pooling: mean, span: query},{pooling: last, span: query}"
    cells = plan(config, grid, changes=["supervision.thinking.signal=feature"])
    assert [cell.config.supervision.feature.pooling for cell in cells] == ["mean", "last"]
    (cell,) = plan(config, "data.train='a,b.jsonl'")
    assert cell.config.data.train == "a,b.jsonl"


def test_names_are_safe_and_tell_every_value_apart(config):
    values = ["a/b", "a-b", "a b", "../a-b", "dữ liệu", "x" * 80, "x" * 81]
    cells = plan(config, f"data.train={','.join(values)}", seeds=[0])
    assert [cell.config.data.train for cell in cells] == values
    assert len({cell.name.lower() for cell in cells}) == len(values)
    assert names(cells)[1] == "train=a-b,seed=0"
    for cell in cells:
        assert cell.name.isascii()
        assert not set(cell.name) & set(' /\\:*?"<>|')
        assert cell.folder.parent == config.parent / "sweep"


def test_names_stay_short_enough_for_a_file_system(config):
    keys = ["model", "revision", "data.english", "data.validation", "data.validation_english", "data.template"]
    cells = plan(config, *(f"{key}={'a' * 60},{'b' * 60}" for key in keys), seeds=[0, 1])
    assert len(set(names(cells))) == 2 ** len(keys) * 2
    assert max(len(name) for name in names(cells)) <= 200


def test_more_values_and_seeds_leave_names_as_they_were(config):
    before = names(plan(config, "data.train=a/b", seeds=[0]))
    after = names(plan(config, "data.train=a/b,a-b", seeds=[0, 1]))
    assert set(before) < set(after)


def test_keys_of_one_name_keep_their_sections():
    labels = [
        option.label for axis in parse_grid(["data.limit=5", "training.limit=5", "data.train=a"]) for option in axis
    ]
    assert labels == ["data.limit=5", "training.limit=5", "train=a"]


def test_ablation_is_table_3(config):
    axis = ablation_axis(load_config(config), "logits,feature")
    cells = {cell.name: cell.config for cell in plan(config, axes=[axis], seeds=[0])}
    tft = cells.pop("tft,seed=0")
    assert tft.method == "tft"
    signals = {
        name: (config.supervision.conversion.signal, config.supervision.thinking.signal)
        for name, config in cells.items()
    }
    assert signals == {
        "LC=logits,seed=0": ("logits", "none"),
        "ET=logits,seed=0": ("none", "logits"),
        "LC=logits,ET=logits,seed=0": ("logits", "logits"),
        "LC=feature,seed=0": ("feature", "none"),
        "ET=feature,seed=0": ("none", "feature"),
        "LC=feature,ET=feature,seed=0": ("feature", "feature"),
    }
    assert {config.method for config in cells.values()} == {"deep-supervision"}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (("feature", "logits"), ("feature", "logits")),
        (("none", "feature"), ("feature", "feature")),
        (("feature", "none"), ("feature", "feature")),
        (("none", "none"), ("logits", "logits")),
    ],
)
def test_ablation_takes_the_signals_of_the_run(tmp_path, own, expected):
    supervision = {name: {"signal": signal} for name, signal in zip(("conversion", "thinking"), own, strict=True)}
    config = load_config(write(tmp_path, method="tft", supervision=supervision))
    conversion, thinking = expected
    labels = [option.label for option in ablation_axis(config)]
    assert labels == ["tft", f"LC={conversion}", f"ET={thinking}", f"LC={conversion},ET={thinking}"]


def test_ablation_over_layers_holds_each_term_at_its_own_layers(config):
    axis = ablation_axis(load_config(config))
    cells = plan(config, "supervision.thinking.layer=5,10", axes=[axis], seeds=[0])
    assert names(cells) == [
        "tft,seed=0",
        "LC=logits,seed=0",
        "thinking.layer=5,ET=logits,seed=0",
        "thinking.layer=5,LC=logits,ET=logits,seed=0",
        "thinking.layer=10,ET=logits,seed=0",
        "thinking.layer=10,LC=logits,ET=logits,seed=0",
    ]


NO_LIST = "an empty value, an open bracket or quote, or no YAML found; expected key=value,value"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("method", "--grid method: expected key=value,value such as supervision.thinking.layer=5,10,15"),
        ("=1", "--grid =1: expected key=value,value such as supervision.thinking.layer=5,10,15"),
        ("method=", "--grid method=: expected key=value,value such as supervision.thinking.layer=5,10,15"),
        ("method=tft,,sft", f"--grid method=tft,,sft: {NO_LIST}"),
        ("method=tft,", f"--grid method=tft,: {NO_LIST}"),
        ("seed=0,1", "--grid seed=0,1: use --seeds for seed"),
        ("output_dir=a,b", "--grid output_dir=a,b: use --out for output_dir"),
        ("a=1e-4,0.0001", "--grid a=1e-4,0.0001: 0.0001 is given twice"),
        ("a={b,c", f"--grid a={{b,c: {NO_LIST}"),
        ("a=[: ]", f"--grid a=[: ]: {NO_LIST}"),
    ],
)
def test_wrong_grids_are_refused(grid, message):
    with pytest.raises(UsageError) as error:
        parse_grid([grid])
    assert str(error.value) == message


def test_a_key_may_have_one_grid_only(config):
    with pytest.raises(UsageError, match="method has a --grid already"):
        parse_grid(["method=tft", "method=sft"])
    axis = ablation_axis(load_config(config))
    for grid in ("method=tft,sft", "supervision.thinking.signal=logits", "supervision.thinking={layer: 5}"):
        with pytest.raises(UsageError, match="would be set twice in each cell"):
            plan(config, grid, axes=[axis])


def test_unknown_key_is_named_with_its_cell(config):
    with pytest.raises(
        UsageError, match=r"unknown key supervision.thinking.layr; did you mean .*\(cell thinking.layr=5\)"
    ):
        plan(config, "supervision.thinking.layr=5")


def test_seeds():
    assert parse_seeds("") == []
    assert parse_seeds(" 0, 12 ,3") == [0, 12, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,x", "--seeds 0,x: 'x' found; allowed: whole numbers from 0, such as 0,1,2"),
        ("-1", "--seeds -1: '-1' found; allowed: whole numbers from 0, such as 0,1,2"),
        ("0,,1", "--seeds 0,,1: '' found; allowed: whole numbers from 0, such as 0,1,2"),
        ("1,01", "--seeds 1,01: 1 is given twice"),
    ],
)
def test_wrong_seeds_are_refused(text, message):
    with pytest.raises(UsageError) as error:
        parse_seeds(text)
    assert str(error.value) == message


@pytest.mark.parametrize("signals", ["none", "logit", "logits,"])
def test_wrong_signals_are_refused(config, signals):
    with pytest.raises(UsageError, match=r"--signals .* found; allowed: logits, feature"):
        ablation_axis(load_config(config), signals)
