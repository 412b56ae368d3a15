from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_config, tiny_rows
from tiny_training import arguments, make_pairs

from pivotune.config.settings import DataConfig, RunConfig
from pivotune.data.datasets import spread
from pivotune.data.examples import Pair
from pivotune.data.formats import row_name
from pivotune.errors import UsageError
from pivotune.layers.measure import analyze_layers
from pivotune.objectives.deep_supervision import build_objectives
from pivotune.objectives.english_nll import PositionalNLL
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.layer_choice import check_layers, choose_supervision
from pivotune.training.preparation import (
    build_encoder,
    build_heldout_datasets,
    build_train_dataset,
    context_length,
    encode_dataset,
    encode_rows,
    heldout_examples,
    load_run_rows,
)

PAIRS = make_pairs(8)


def a_run(data: DataConfig, method: str) -> RunConfig:
    return RunConfig(model="m", method=method, data=data, output_dir="run")


def one_line(raised: Any) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


def chosen(tmp_path, *, layers: Any = None, pairs: Any = PAIRS, **changes: Any):
    return choose_supervision(arguments(tmp_path, **changes), build_tiny_model(), build_tiny_tokenizer(), pairs, layers)


# ---- rows ----


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of three answers each, with their English, and a column that nothing reads."""

    def turns(row: int, suffix: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": f"{role} {row}.{turn}{suffix}"}
            for turn in range(3)
            for role in ("user", "assistant")
        ]

    return [{"messages": turns(row, ""), "messages_en": turns(row, " en"), "topic": "x"} for row in range(count)]


@pytest.mark.parametrize(("turns", "most", "line"), [
    ("all", 3, "8 rows have earlier turns: 24 of 24 answers are trained"),
    ("last", 1, "8 rows have earlier turns: 8 of 24 answers are trained (data.turns: last)"),
])  # fmt: skip
def test_every_answer_is_trained_and_no_conversation_is_on_both_sides(tmp_path, turns, most, line):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(conversations(10)))
    loaded = load_run_rows(a_run(DataConfig(train=str(path), validation=2, turns=turns), "deep-supervision"))
    assert Counter(row.number for row in loaded.train) == dict.fromkeys({row.number for row in loaded.train}, most)
    assert len(loaded.heldout) == 2
    assert not {row.number for row in loaded.train} & {row.number for row in loaded.heldout}
    assert all(row.completion.endswith(".2") for row in loaded.heldout)
    assert loaded.notes == ["columns that are not used: 'topic' (in 10 rows)", line]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_are_mixed_by_weight_after_rows_are_held_out(tmp_path):
    a, c = write(tmp_path / "a.jsonl", tiny_rows(20)), write(tmp_path / "c.jsonl", tiny_rows(8))
    texts = [{"id": row["id"], "prompt": row["prompt_en"], "completion": row["completion_en"]} for row in tiny_rows(10)]
    english = write(tmp_path / "en.jsonl", texts)
    target = [{key: row[key] for key in ("id", "prompt", "completion")} for row in tiny_rows(10)]
    b = write(tmp_path / "b.jsonl", target[::-1])
    train = [{"path": a, "weight": 2}, {"path": b, "english": english}, {"path": c, "weight": 0.5}]
    data = DataConfig(train=train, validation=8, english_ratio=0)
    loaded = load_run_rows(a_run(data, "deep-supervision"))
    seen, held = Counter(row.number for row in loaded.train), {row.number for row in loaded.heldout}
    assert len(held) == 8
    assert not held & set(seen)
    in_a, in_b, in_c = (
        [number for number in seen if number <= 20],
        [n for n in seen if 20 < n <= 30],
        [n for n in seen if n > 30],
    )
    assert {seen[number] for number in in_a} == {2}
    assert {seen[number] for number in (*in_b, *in_c)} == {1}
    kept_c = 8 - sum(number > 30 for number in held)
    assert (len(in_a) + len(in_b), len(in_c)) == (30 - sum(number <= 30 for number in held), round(kept_c / 2))
    assert loaded.sources == loaded.heldout_sources == {a: 0, b: 20, c: 30}
    assert loaded.notes == [
        f"{a}: {2 * len(in_a)} rows an epoch ({len(in_a)} rows, weight 2)",
        f"{b}: {len(in_b)} rows an epoch ({len(in_b)} rows, weight 1)",
        f"{c}: {len(in_c)} rows an epoch ({kept_c} rows, weight 0.5)",
    ]
    assert next(row for row in loaded.train if row.number == in_b[-1]).prompt_en.startswith("Which number is")
    # The same rows are held out, whatever they weigh; a limit is of each file.
    even = load_run_rows(a_run(DataConfig(train=[a, {"path": b, "english": english}, c], validation=8), "tft"))
    assert [row.number for row in even.heldout] == [row.number for row in loaded.heldout]
    few = load_run_rows(a_run(DataConfig(train=[a, c], validation=0, limit=3), "tft"))
    assert [row.number for row in few.train] == [1, 2, 3, 4, 5, 6]


def test_draws_of_a_run_with_one_language_are_those_of_earlier_versions(tmp_path):
    """Rows may name it or not, and their key `language` may mean something else."""
    other = {**tiny_rows(12)[3], "language": "python"}
    for label in ({}, {"language": "sw"}):
        a, b = ([{**row, **label} for row in tiny_rows(count)] for count in (12, 8))
        paths = [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)]
        one = load_run_rows(a_run(DataConfig(train=paths[0], validation=3, language="sw"), "tft"))
        assert ([row.number for row in one.train], [row.number for row in one.heldout], one.notes) == (
            [1, 2, 3, 4, 5, 6, 7, 8, 10], [9, 11, 12], []
        )  # fmt: skip
        train = [paths[0], {"path": paths[1], "weight": 1.5}]
        two = load_run_rows(a_run(DataConfig(train=train, validation=3, language="sw"), "tft"))
        assert [row.number for row in two.heldout] == [4, 14, 17]
        assert [row.number for row in two.train] == [
            1,
            2,
            3,
            5,
            6,
            7,
            8,
            9,
            10,
            11,
            12,
            13,
            15,
            16,
            18,
            19,
            20,
            13,
            19,
            20,
        ]
        assert {one.config.data.language, two.config.data.language} == {"sw"}
        assert {row.language for row in (*one.train, *two.train, *two.heldout)} == {""}
    mixed = write(tmp_path / "a.jsonl", [*tiny_rows(3), other, *tiny_rows(12)[4:]])
    found = load_run_rows(a_run(DataConfig(train=mixed, validation=3, language="sw"), "tft"))
    assert [row.number for row in found.train] == [row.number for row in one.train]
    (note,) = found.notes
    assert note.startswith(f"the key `language` is not used: {mixed}, line 4: language 'python' is unknown")


def test_languages_are_balanced_after_rows_are_held_out(tmp_path):
    a = write(tmp_path / "a.jsonl", tiny_rows(80))
    b = write(tmp_path / "b.jsonl", [{**row, "language": "vi"} for row in tiny_rows(30)])
    data = DataConfig(train=[a, {"path": b, "weight": 0.5}], validation=11, language="sw", language_temperature=2)
    loaded = load_run_rows(a_run(data, "tft"))
    assert Counter(row.language for row in loaded.heldout) == {"sw": 8, "vi": 3}
    # 72 rows of sw and a half of 27 rows of vi.
    total, powers = 72 + 14, np.sqrt([72, 14])
    expected = dict(zip(("sw", "vi"), np.round(total * powers / powers.sum()).astype(int).tolist(), strict=True))
    assert Counter(row.language for row in loaded.train) == expected == {"sw": 60, "vi": 26}
    assert not {row.number for row in loaded.heldout} & {row.number for row in loaded.train}
    assert len({row.number for row in loaded.train if row.language == "vi"}) == 14, "the half that the weight has drawn"
    assert loaded.notes == [
        f"{a}: 60 rows an epoch (72 rows, weight 1)",
        f"{b}: 26 rows an epoch (27 rows, weight 0.5)",
        "sw: 60 rows an epoch (72 without data.language_temperature 2)",
        "vi: 26 rows an epoch (14 without data.language_temperature 2)",
    ]
    assert loaded.config.data.language == ["sw", "vi"]
    again = load_run_rows(a_run(loaded.config.data, "tft"))
    assert list(again.train) == list(loaded.train)
    even = load_run_rows(a_run(data.model_copy(update={"language_temperature": 1.0}), "tft"))
    assert [row.number for row in even.heldout] == [row.number for row in loaded.heldout]
    assert even.notes[2:] == ["sw: 72 rows an epoch", "vi: 14 rows an epoch"]


def test_rows_given_in_python_are_balanced_too(tmp_path):
    rows = [{**row, "language": "sw" if place % 4 else "vi"} for place, row in enumerate(tiny_rows(40))]
    args = arguments(tmp_path, data={"language_temperature": 1000})
    pairs = encode_dataset(rows, args, build_tiny_tokenizer(), tiny_config("llama"))
    assert Counter(pair.language for pair in pairs) == {"sw": 20, "vi": 20}
    held = encode_dataset(rows[:2], args, build_tiny_tokenizer(), tiny_config("llama"), heldout=True)
    assert [pair.language for pair in held] == ["vi", "sw"]


def test_one_file_can_weigh_too_and_a_validation_file_stays_whole(tmp_path):
    a, held = write(tmp_path / "a.jsonl", tiny_rows(6)), write(tmp_path / "held.jsonl", tiny_rows(3))
    loaded = load_run_rows(a_run(DataConfig(train=[{"path": a, "weight": 1.5}], validation=held), "tft"))
    assert sorted(Counter(row.number for row in loaded.train).values()) == [1, 1, 1, 2, 2, 2]
    assert (len(loaded.heldout), loaded.heldout_sources) == (3, {held: 0})
    assert loaded.notes == [f"{a}: 9 rows an epoch (6 rows, weight 1.5)"]


def test_rows_of_several_files_are_named_by_file_and_line(tmp_path):
    a = write(tmp_path / "a.jsonl", tiny_rows(3))
    long = {**tiny_rows(1)[0], "prompt": "namba " * 300}
    b = write(tmp_path / "b.jsonl", [tiny_rows(1)[0], long])
    args, tokenizer = arguments(tmp_path, max_prompt_tokens=500), build_tiny_tokenizer()
    encoder = build_encoder(args, tokenizer, tiny_config("llama"))
    loaded = load_run_rows(a_run(DataConfig(train=[a, b], validation=0), "tft"))
    with pytest.raises(UsageError, match=rf"^{b}: line 2: the prompt fills the model's 256 tokens"):
        encode_rows(loaded.train, encoder, on_bad_row="error", sources=loaded.sources)
    pairs = encode_rows(loaded.train, encoder, on_bad_row="skip", sources=loaded.sources)
    assert [row_name(pair.number, pairs.sources) for pair in pairs] == [f"{a}:1", f"{a}:2", f"{a}:3", f"{b}:1"]


def test_turns_and_columns_that_are_not_used_are_told_in_python(tmp_path, caplog):
    rows = conversations(4)
    rows[0]["messages_en"] = rows[0]["messages_en"][-2:]
    args = DeepSupervisionConfig(str(tmp_path), report_to="none")
    tokenizer = build_tiny_tokenizer()
    pairs = encode_dataset(rows, args, tokenizer, tiny_config("llama"))
    assert pairs is not None
    answers = [tokenizer.decode(pair.target.ids[pair.target.answer :]) for pair in pairs]
    assert answers[:4] == [
        "assistant 0.2<|end|>",
        "assistant 1.0<|end|>",
        "assistant 1.1<|end|>",
        "assistant 1.2<|end|>",
    ]
    assert caplog.messages == [
        "the given rows: columns that are not used: 'topic' (in 4 rows)",
        "the given rows: 4 rows have earlier turns: 10 of 12 answers are trained; the others' English has other turns",
    ]
    assert len(encode_dataset(rows, args, tokenizer, tiny_config("llama"), heldout=True) or []) == 4


def test_context_is_read_from_any_configuration():
    assert context_length(tiny_config("llama", max_position_embeddings=77)) == 77
    assert context_length(tiny_config("gpt2", n_positions=55)) == 55
    assert context_length(tiny_config("gemma3", max_position_embeddings=66)) == 66


def test_limits_and_template_reach_the_encoder(tmp_path):
    args = arguments(tmp_path, max_prompt_tokens=31, max_completion_tokens=17, template="alpaca")
    encoder = build_encoder(args, build_tiny_tokenizer(), tiny_config("llama", max_position_embeddings=77))
    assert (encoder.limits.prompt, encoder.limits.completion, encoder.limits.context) == (31, 17, 77)
    with pytest.raises(UsageError, match=r"alpaca"):
        build_encoder(arguments(tmp_path, template="alpac"), build_tiny_tokenizer(), tiny_config("llama"))


def test_rows_that_lack_english_are_named(tmp_path):
    rows = tiny_rows(3)
    del rows[1]["prompt_en"]
    args, tokenizer, model = arguments(tmp_path), build_tiny_tokenizer(), build_tiny_model().config
    with pytest.raises(UsageError) as raised:
        encode_dataset(rows, args, tokenizer, model)
    assert "row 2" in one_line(raised)
    assert "prompt_en" in one_line(raised)
    assert "deep-supervision" in one_line(raised)
    skipping = arguments(tmp_path, on_bad_row="skip")
    assert [pair.number for pair in encode_dataset(rows, skipping, tokenizer, model)] == [1, 3]
    assert [pair.english is None for pair in encode_dataset(rows, args, tokenizer, model, heldout=True)] == [
        False,
        True,
        False,
    ]


def test_encoded_rows_and_nothing_pass_through(tmp_path):
    args = arguments(tmp_path)
    assert encode_dataset(PAIRS, args, None, build_tiny_model()) is PAIRS
    assert encode_dataset(None, args, None, build_tiny_model()) is None
    assert build_train_dataset(None, args, tiny_config("llama")) is None
    assert build_heldout_datasets(None, args, None, build_tiny_model()) is None


def test_branch_that_does_not_fit_the_model(tmp_path):
    """The English query follows the target prompt, so both must fit together."""
    longest = max(pair.target.answer + pair.english.num_query_tokens for pair in PAIRS)
    config = tiny_config("llama", max_position_embeddings=longest - 1)
    with pytest.raises(UsageError, match=rf"take {longest} tokens together and the model reads {longest - 1}"):
        build_train_dataset(PAIRS, arguments(tmp_path, english_ratio=0.0), config)
    assert (
        len(build_train_dataset(PAIRS, arguments(tmp_path), tiny_config("llama", max_position_embeddings=longest))) == 8
    )
    assert len(build_train_dataset(PAIRS, arguments(tmp_path, method="tft"), config)) == 8


def test_heldout_rows_by_language():
    pairs = [Pair(PAIRS[0].target, None), Pair(None, PAIRS[1].english), PAIRS[2]]
    sides = heldout_examples(pairs)
    assert [example.main for example in sides["target"]] == [PAIRS[0].target, PAIRS[2].target]
    assert [example.main for example in sides["english"]] == [PAIRS[1].english, PAIRS[2].english]
    assert [example.english_prompt for example in sides["english"]] == [True, True]
    assert set(heldout_examples(pairs[:1])) == {"target"}
    assert heldout_examples([]) == {}


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 4, [0, 2, 5, 7]),
        (3, 5, [0, 1, 2]),
        (1, 1, [0]),
        (0, 4, []),
        (7, 7, list(range(7))),
    ],
)
def test_spread_is_even(size, count, expected):
    assert spread(list(range(size)), count) == expected


# ---- layers ----


def test_layers_that_were_asked_for_need_no_measuring(tmp_path):
    supervision, layers = chosen(tmp_path, pairs=None)
    assert (supervision.conversion.layer, supervision.thinking.layer) == (1, 3)
    assert layers is None


def test_auto_layers_are_measured_on_rows_spread_over_the_data(tmp_path):
    supervision, layers = chosen(
        tmp_path, conversion_layer="auto", thinking_layer="auto", profile_rows=3, language="sw"
    )
    expected = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), [PAIRS[0], PAIRS[2], PAIRS[5]], language="sw")
    assert layers == {**expected, "supervised": ["conversion", "thinking"]}
    assert (supervision.conversion.layer, supervision.thinking.layer) == (layers["conversion"], layers["thinking"])


def test_given_analysis_is_used_and_not_measured_again(tmp_path):
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS)
    given = {**analysis, "conversion": 2, "thinking": 3, "reason": "as given"}
    supervision, layers = chosen(tmp_path, layers=given, pairs=None, conversion_layer="auto", thinking_layer="auto")
    assert (supervision.conversion.layer, supervision.thinking.layer) == (2, 3)
    assert layers["reason"] == "as given"


def test_one_layer_asked_for_and_one_chosen(tmp_path):
    """What is recorded is what is used, not what was measured."""
    supervision, layers = chosen(tmp_path, conversion_layer="auto", thinking_layer=3)
    assert supervision.thinking.layer == layers["thinking"] == 3
    assert supervision.conversion.layer == layers["conversion"] < 3


@pytest.mark.parametrize("layer", ["auto", 2])
def test_thinking_alone(tmp_path, layer):
    supervision, layers = chosen(tmp_path, conversion_signal="none", conversion_layer="auto", thinking_layer=layer)
    assert set(supervision.active()) == {"thinking"}
    assert supervision.thinking.layer == (2 if layer == 2 else layers["thinking"])
    assert (layers is None) == (layer == 2)


def test_every_option_reaches_the_objective(tmp_path):
    options = {
        "conversion": {"signal": "feature", "layer": 1},
        "thinking": {"signal": "logits", "layer": 3},
        "lens": "logit",
        "logits": {"mode": "positional", "norm": "none", "gradient": "all"},
        "feature": {"pooling": "last", "span": "query+answer", "english": "joint", "english_norm": "raw"},
    }
    supervision, _ = choose_supervision(
        DeepSupervisionConfig(str(tmp_path), use_cpu=True, supervision=options),
        build_tiny_model(),
        build_tiny_tokenizer(),
        PAIRS,
    )
    (cosine, conversion), (nll, thinking) = build_objectives(supervision)
    assert (conversion, thinking) == ([("conversion", 1)], [("thinking", 3)])
    assert isinstance(nll, PositionalNLL)
    assert nll.options.model_dump(exclude={"forward"}) == options["logits"]
    assert cosine.options.model_dump() == options["feature"]


@pytest.mark.parametrize("method", ["tft", "sft"])
def test_baselines_have_no_inner_losses(tmp_path, method):
    supervision, layers = chosen(tmp_path, method=method, conversion_layer=99, thinking_layer=100)
    assert supervision.active() == {}
    assert layers is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"thinking_layer": 4}, ("supervision.thinking.layer: 4", "choose 1 to 3")),
        ({"conversion_layer": 2, "thinking_layer": 77}, ("supervision.thinking.layer: 77",)),
        ({"conversion_signal": "none", "thinking_layer": 4}, ("supervision.thinking.layer: 4",)),
        (
            {"thinking_signal": "none", "thinking_layer": "auto", "conversion_layer": 5},
            ("supervision.conversion.layer: 5",),
        ),
        ({"conversion_layer": 3, "thinking_layer": "auto"}, ("3",)),
        ({"conversion_layer": "auto", "thinking_layer": 1}, ("1",)),
    ],
)
def test_layers_that_the_model_lacks(tmp_path, changes, words):
    """Found without a model, from its number of blocks."""
    with pytest.raises(UsageError) as raised:
        check_layers(arguments(tmp_path, **changes).supervision, 4)
    assert all(word in one_line(raised) for word in words)


def test_both_signals_off_is_tft(tmp_path):
    with pytest.raises(UsageError, match="both signals are none; that is method: tft"):
        chosen(tmp_path, conversion_signal="none", thinking_signal="none")
