from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from math import floor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import build_tiny_tokenizer, tiny_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pivotune.config.registry import METHODS
from pivotune.data.datasets import (
    check_branch_lengths,
    replay_indices,
    split_validation,
    training_examples,
    weighted_places,
)
from pivotune.data.examples import Encoder, Limits, Pair, Side, preview
from pivotune.data.rows import Row
from pivotune.data.sources import load_rows
from pivotune.data.templates import Turn, load_template
from pivotune.errors import UsageError

ROOMY = Limits(prompt=10_000, completion=10_000)
TEXTS = {
    "vi": ("Thủ đô của Việt Nam là gì?", "Thủ đô là Hà Nội."),
    "zh": ("中国的首都是哪里？", "北京。"),
    "ar": ("ما هي عاصمة مصر؟", "القاهرة."),
    "am": ("የኢትዮጵያ ዋና ከተማ ምንድን ነው?", "አዲስ አበባ።"),
    "th": ("เมืองหลวงของไทยคืออะไร", "กรุงเทพฯ"),
    "emoji": ("👩‍👩‍👧‍👦 và 🇻🇳 là gì?", "Một gia đình 👨‍👩‍👦, một lá cờ 🏴󠁧󠁢󠁳󠁣󠁴󠁿"),
    "combining marks": ("e\u0301 va\u0300 o\u031b\u0301 q\u0323", "a\u0302\u0301"),
    "words of the template": ("user assistant", "### Response:"),
}
PAIRS = [
    Row(*texts, "What is it?", "It is this.", id=name, number=n) for n, (name, texts) in enumerate(TEXTS.items(), 1)
]


def build_byte_tokenizer(merge: tuple[str, str] = (":", "("), **changes) -> PreTrainedTokenizerFast:
    """One token for each byte, so that counts follow from the text; only `:(` is one token together."""
    special = ["<|pad|>", "<|end|>"]
    vocabulary = {
        token: index
        for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(merge)])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[merge]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"pad_token": "<|pad|>", "eos_token": "<|end|>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def build_metaspace_tokenizer(**changes) -> PreTrainedTokenizerFast:
    """As SentencePiece models are: Unigram over `▁words`, begin-of-text added by the tokenizer itself."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    corpus = [text for texts in TEXTS.values() for text in texts]
    corpus += [text for row in tiny_rows(8) for text in row.values()] + ["### Instruction:\n\n### Input:\n"]
    alphabet = sorted({character for text in [*corpus, ENGLISH_LETTERS] for character in text if character != " "})
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


ENGLISH_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:?!#'"


def encoder_for(tokenizer, template: str | None = None, limits: Limits = ROOMY) -> Encoder:
    return Encoder(tokenizer, load_template(template, tokenizer), limits)


def decode(tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist())


def assert_spans_hold_the_texts(tokenizer, side: Side, query: str, answer: str, end: str) -> None:
    assert decode(tokenizer, side.ids[slice(*side.query)]).strip() == query.strip()
    assert decode(tokenizer, side.ids[side.answer :]) == answer + end
    assert tokenizer.convert_ids_to_tokens(int(side.ids[-1])) == end
    assert side.characters == len(answer)
    assert side.query[1] <= side.answer


# --- spans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_spans_hold_query_and_answer_on_both_sides(tokenizer, template):
    pairs = encoder_for(tokenizer, template).encode(PAIRS)
    assert [pair.number for pair in pairs] == [row.number for row in PAIRS]
    for row, pair in zip(PAIRS, pairs, strict=True):
        assert_spans_hold_the_texts(tokenizer, pair.target, row.prompt, row.completion, "<|end|>")
        assert_spans_hold_the_texts(tokenizer, pair.english, row.prompt_en, row.completion_en, "<|end|>")
        # Byte-level tokens do not change blanks, so here the texts are exact.
        assert decode(tokenizer, pair.target.ids[slice(*pair.target.query)]) == row.prompt


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_sequence_is_the_rendered_text(tokenizer, template):
    loaded = load_template(template, tokenizer)
    for row, pair in zip(PAIRS, encoder_for(tokenizer, template).encode(PAIRS), strict=True):
        rendered = loaded.render(Turn(row.prompt, row.completion))
        side = pair.target
        assert decode(tokenizer, side.ids) == rendered.prompt + rendered.completion
        assert decode(tokenizer, side.ids[: side.query[0]]) == rendered.prefix
        assert decode(tokenizer, side.ids[side.query[1] : side.answer]) == rendered.suffix


def test_spans_with_a_sentencepiece_like_tokenizer():
    tokenizer = build_metaspace_tokenizer()
    for row, pair in zip(PAIRS, encoder_for(tokenizer, "alpaca").encode(PAIRS), strict=True):
        for side, query, answer in (
            (pair.target, row.prompt, row.completion),
            (pair.english, row.prompt_en, row.completion_en),
        ):
            assert tokenizer.unk_token_id not in side.ids
            assert_spans_hold_the_texts(tokenizer, side, query, answer, "</s>")
            # Begin-of-text once, as `tokenizer(text)` would put it.
            assert side.ids[0] == tokenizer.bos_token_id
            assert (side.ids == tokenizer.bos_token_id).sum() == 1
            assert side.ids[: side.answer].tolist() == tokenizer(decode_prompt(query))["input_ids"]


def decode_prompt(query: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{query}\n\n### Response:"
    )


def test_begin_of_text_is_never_doubled(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ bos_token }}{{ prompt }}\n{{ completion }}", encoding="utf-8")
    chat = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer = build_metaspace_tokenizer(chat_template=chat)
    for template in ("chat", "alpaca", str(path)):
        side = encoder_for(tokenizer, template).encode(PAIRS[:1])[0].target
        assert side.ids[0] == tokenizer.bos_token_id
        assert (side.ids == tokenizer.bos_token_id).sum() == 1
        assert decode(tokenizer, side.ids[slice(*side.query)]).strip() == PAIRS[0].prompt


def test_begin_of_text_is_not_added_where_the_tokenizer_adds_none(tokenizer):
    named = build_tiny_tokenizer(bos_token="<|begin|>")
    expected = encoder_for(tokenizer, "alpaca").encode(PAIRS[:1])[0].target.ids
    assert encoder_for(named, "alpaca").encode(PAIRS[:1])[0].target.ids.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_spans_with_the_real_tokenizer(smollm2, shared_data, template):
    from pivotune.models.loading import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    rows = PAIRS + [row for language in ("vi", "zh") for row in real_rows(shared_data, language, 300)]
    for row, pair in zip(rows, encoder_for(tokenizer, template).encode(rows), strict=True):
        assert_spans_hold_the_texts(tokenizer, pair.target, row.prompt, row.completion, tokenizer.eos_token)
        assert_spans_hold_the_texts(tokenizer, pair.english, row.prompt_en, row.completion_en, tokenizer.eos_token)


def real_rows(folder, language: str, count: int) -> list[Row]:
    with gzip.open(folder / "train" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, count)]
    keys = ("prompt", "completion", "prompt_en", "completion_en")
    return [Row(*(record[key] for key in keys), number=number) for number, record in enumerate(records, 1)]


def test_border_merge_keeps_the_prompt_as_generation_sees_it():
    """`### Response:` and an answer that begins with `(` would share the token `:(`."""
    tokenizer = build_byte_tokenizer()
    encoder = encoder_for(tokenizer, "alpaca")
    row = Row("Why?", "(because)", "Why?", "Because.")
    merged = tokenizer.convert_tokens_to_ids(":(")
    assert merged in tokenizer(decode_prompt("Why?") + row.completion)["input_ids"]
    side = encoder.encode([row])[0].target
    assert merged not in side.ids
    assert side.ids[: side.answer].tolist() == encoder.encode_prompt(Turn("Why?"))
    assert decode(tokenizer, side.ids[side.answer :]) == "(because)<|end|>"


@pytest.mark.parametrize("build", [build_tiny_tokenizer, build_metaspace_tokenizer, build_byte_tokenizer])
def test_prompt_for_generation_is_the_prompt_of_training(build):
    tokenizer = build()
    encoder = encoder_for(tokenizer)
    for row, pair in zip(PAIRS, encoder.encode(PAIRS), strict=True):
        assert encoder.encode_prompt(Turn(row.prompt)) == pair.target.ids[: pair.target.answer].tolist()


def test_missing_sides_stay_missing(tokenizer):
    rows = [Row("q", "a", "", "", number=1), Row("", "", "q", "a", number=2), Row("q", "a", "q", "a", number=3)]
    pairs = encoder_for(tokenizer).encode(rows)
    assert [(pair.target is None, pair.english is None) for pair in pairs] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert pairs[0].target.ids.tolist() == pairs[1].english.ids.tolist()


def test_order_and_count_over_several_calls(tokenizer):
    rows = [Row(f"q {n}", f"a {n}", f"e {n}", f"f {n}", number=n) for n in range(1, 1101)]
    encoder = encoder_for(tokenizer)
    pairs = encoder.encode(row for row in rows)
    assert [pair.number for pair in pairs] == list(range(1, 1101))
    assert decode(tokenizer, pairs[1099].english.ids[slice(*pairs[1099].english.query)]) == "e 1100"
    assert (encoder.report.cut, encoder.report.skipped) == ({}, {})


def test_tokenizer_without_a_fast_version():
    class Slow:
        is_fast, bos_token_id = False, None

    encoder = Encoder(Slow(), SimpleNamespace(adds_special_tokens=True, render=lambda turn: turn), ROOMY)
    with pytest.raises(UsageError, match="Slow has no fast version"):
        encoder._ids(["text"])


# --- truncation ----------------------------------------------------------------------------------------------------

FRAME = 2  # the template `Q...A` of one-byte tokens


@pytest.fixture(scope="module")
def byte_encoder(tmp_path_factory):
    """Makes encoders whose counts can be worked out by hand: one token a byte, `Q` and `A` around the query."""
    path = tmp_path_factory.mktemp("templates") / "template.jinja"
    path.write_text("Q{{ prompt }}A{{ completion }}", encoding="utf-8")
    tokenizer = build_byte_tokenizer()
    template = load_template(str(path), tokenizer)
    return lambda limits: Encoder(tokenizer, template, limits)


def lettered(count: int) -> str:
    """A text of `count` bytes in which a cut at another place would show."""
    return "".join(chr(ord("a") + index % 26) for index in range(count))


def row_of(query: int, answer: int, query_en: int, answer_en: int, number: int = 1) -> Row:
    return Row(*(lettered(count) for count in (query, answer, query_en, answer_en)), number=number)


def test_both_sides_keep_the_same_share_of_the_query(byte_encoder):
    encoder = byte_encoder(Limits(prompt=12))
    pair = encoder.encode([row_of(20, 5, 8, 5)])[0]
    # 12 - 2 of 20 tokens is a half, so the English query keeps a half too although it fits.
    assert (pair.target.query, pair.target.answer) == ((1, 11), 12)
    assert (pair.english.query, pair.english.answer) == ((1, 5), 6)
    assert decode(encoder.tokenizer, pair.target.ids) == "Q" + lettered(20)[:10] + "A" + lettered(5) + "<|end|>"
    assert decode(encoder.tokenizer, pair.english.ids) == "Q" + lettered(8)[:4] + "A" + lettered(5) + "<|end|>"
    assert (encoder.report.cut, encoder.report.skipped) == ({"prompts": 1}, {})


def test_both_sides_keep_the_same_share_of_the_answer_and_lose_the_end(byte_encoder):
    encoder = byte_encoder(Limits(completion=10))
    # With its end token the English answer has 40 tokens and may keep 10, a quarter; the target has 9.
    pair = encoder.encode([row_of(3, 8, 3, 39)])[0]
    assert decode(encoder.tokenizer, pair.english.ids) == "QabcA" + lettered(39)[:10]
    assert decode(encoder.tokenizer, pair.target.ids) == "QabcA" + lettered(8)[:2]
    assert (pair.target.characters, pair.english.characters) == (2, 10)
    assert encoder.report.cut == {"answers": 1}


def test_rows_that_just_fit_are_left_alone(byte_encoder):
    encoder = byte_encoder(Limits(prompt=10 + FRAME, completion=6, context=10 + FRAME + 6))
    pair = encoder.encode([row_of(10, 5, 10, 5)])[0]
    assert decode(encoder.tokenizer, pair.target.ids) == "Q" + lettered(10) + "A" + lettered(5) + "<|end|>"
    assert encoder.report.cut == {}


def test_suffix_of_a_chat_template_survives_the_cut(tokenizer):
    encoder = encoder_for(tokenizer, "chat", Limits(prompt=30))
    side = encoder.encode([Row("swali refu sana " * 20, "Ni hivyo.", "q", "a")])[0].target
    assert side.answer == 30
    text = decode(tokenizer, side.ids)
    assert text.startswith("<|user|>\nswali refu")
    assert text.endswith("<|end|>\n<|assistant|>\nNi hivyo.<|end|>")


def test_template_text_in_the_last_token_of_a_query_survives_the_cut():
    """The token ` \\n` holds the end of the query and the first line break of the template."""
    tokenizer = build_byte_tokenizer(merge=("Ġ", "Ċ"))
    row = Row("swali refu sana " * 20, "Ni hivyo.", "q", "a")
    whole = encoder_for(tokenizer, "alpaca").encode([row])[0].target
    assert tokenizer.decode(whole.ids[whole.query[1] - 1]) == " \n"
    for limit in range(whole.answer - 20, whole.answer):
        cut = encoder_for(tokenizer, "alpaca", Limits(prompt=limit)).encode([row])[0].target
        assert cut.answer == limit
        assert decode(tokenizer, cut.ids).endswith("\n\n### Response:Ni hivyo.<|end|>")
        assert decode(tokenizer, cut.ids[slice(*cut.query)]).startswith("swali refu")


@pytest.mark.parametrize("letter", ["é", "字", "ก", "🙂"])
def test_characters_of_a_cut_answer(byte_encoder, letter):
    """Every character of which at least one token is kept counts once."""
    width = len(letter.encode())
    for kept in range(1, 3 * width + 1):
        side = byte_encoder(Limits(completion=kept)).encode([Row("q", letter * 9, "", "")])[0].target
        assert side.num_answer_tokens == kept
        assert side.characters == -(-kept // width)


def test_characters_of_a_cut_answer_leave_special_tokens_out():
    """A chat template may open the answer with one."""
    template = (
        "{{ messages[0]['content'] }}A{% if messages | length > 1 %}<|pad|>{{ messages[1]['content'] }}{% endif %}"
    )
    encoder = encoder_for(build_byte_tokenizer(chat_template=template), "chat", Limits(completion=4))
    side = encoder.encode([Row("q", "abcdef", "", "")])[0].target
    assert decode(encoder.tokenizer, side.ids[side.answer :]) == "<|pad|>abc"
    assert side.characters == 3


def test_context_limit_cuts_answers(byte_encoder):
    encoder = byte_encoder(Limits(prompt=50, completion=100, context=60))
    # The longer prompt, the target's, takes 42 of 60 and leaves 18 for either answer: 18 of 36 is a half.
    pair = encoder.encode([row_of(40, 35, 10, 11)])[0]
    assert (pair.target.num_answer_tokens, pair.english.num_answer_tokens) == (18, 6)
    assert len(pair.target.ids) == 60
    assert pair.target.answer + pair.english.num_answer_tokens <= 60


def test_context_counts_the_longer_prompt_for_both_answers(byte_encoder):
    pair = byte_encoder(Limits(prompt=50, completion=100, context=60)).encode([row_of(10, 35, 40, 11)])[0]
    assert (pair.target.num_answer_tokens, pair.english.num_answer_tokens) == (18, 6)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.tuples(*[st.integers(1, 300)] * 4),
    sides=st.sampled_from(["both", "target", "english"]),
    prompt=st.integers(FRAME + 1, 120),
    completion=st.integers(1, 120),
    spare=st.none() | st.integers(1, 200),
)
def test_truncation_property(byte_encoder, lengths, sides, prompt, completion, spare):
    context = None if spare is None else prompt + spare
    row = row_of(*lengths)
    if sides == "target":
        row = Row(row.prompt, row.completion, "", "")
    elif sides == "english":
        row = Row("", "", row.prompt_en, row.completion_en)
    encoder = byte_encoder(Limits(prompt, completion, context))
    pair = encoder.encode([row])[0]
    texts = {"target": (row.prompt, row.completion), "english": (row.prompt_en, row.completion_en)}
    kept = {name: side for name in texts if (side := getattr(pair, name)) is not None}
    assert set(kept) == ({"target", "english"} if sides == "both" else {sides})

    query_share = min(Fraction(min(len(texts[name][0]), prompt - FRAME), len(texts[name][0])) for name in kept)
    for name, side in kept.items():
        query = texts[name][0][: max(1, floor(len(texts[name][0]) * query_share))]
        assert decode(encoder.tokenizer, side.ids[: side.answer]) == f"Q{query}A"
        assert side.query == (1, 1 + len(query))
        assert side.answer <= prompt

    longest = max(side.answer for side in kept.values())
    room = completion if context is None else min(completion, context - longest)
    answer_share = min(Fraction(min(len(texts[name][1]) + 1, room), len(texts[name][1]) + 1) for name in kept)
    for name, side in kept.items():
        answer = texts[name][1]
        wanted = max(1, floor((len(answer) + 1) * answer_share))
        whole = wanted == len(answer) + 1
        assert decode(encoder.tokenizer, side.ids[side.answer :]) == answer[:wanted] + ("<|end|>" if whole else "")
        assert side.characters == min(wanted, len(answer))
        assert side.num_answer_tokens <= completion
        assert context is None or longest + side.num_answer_tokens <= context
    assert encoder.report.cut["prompts"] == (query_share < 1)
    assert encoder.report.cut["answers"] == (answer_share < 1)


# --- bad rows ------------------------------------------------------------------------------------------------------


def one_line(raised: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_template_longer_than_the_limit(tokenizer):
    encoder = encoder_for(tokenizer, "chat", Limits(prompt=5))
    rows = [Row("q", "a", "q", "a", number=7)]
    with pytest.raises(UsageError) as raised:
        encoder.encode(rows, source="pairs.jsonl")
    frame = len(encoder.encode_prompt(Turn("q"))) - 1
    assert one_line(raised) == (
        f"pairs.jsonl: line 7: the template alone takes more than the 5 tokens of data.max_prompt_tokens; "
        f"allow more (it takes {frame})"
    )


def test_nothing_left_for_the_answer(byte_encoder):
    encoder = byte_encoder(Limits(prompt=50, completion=10, context=42))
    with pytest.raises(UsageError) as raised:
        encoder.encode([row_of(10, 5, 40, 5, number=3)], source="pairs.jsonl")
    assert one_line(raised) == (
        "pairs.jsonl: line 3: the prompt fills the model's 42 tokens and nothing is left for the answer; "
        "lower data.max_prompt_tokens (it takes 42)"
    )


def test_bad_rows_are_skipped_and_counted(byte_encoder):
    encoder = byte_encoder(Limits(prompt=50, completion=3, context=42))
    rows = [row_of(4, 9, 4, 9, 1), row_of(40, 5, 4, 5, 2), row_of(45, 5, 4, 5, 3), row_of(4, 2, 4, 2, 4)]
    pairs = encoder.encode(rows, on_bad_row="skip")
    assert [pair.number for pair in pairs] == [1, 4]
    # Cuts are those of the rows that are kept.
    assert encoder.report.cut == {"answers": 1}
    # One reason for both, though their prompts take 42 and 47 tokens.
    reason = "the prompt fills the model's 42 tokens and nothing is left for the answer; lower data.max_prompt_tokens"
    assert encoder.report.skipped == {reason: 2}


def test_row_that_the_template_refuses_is_named_or_skipped(tokenizer):
    turns = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    rows = [Row("q", "a", "q", "a", number=1), Row("q", "a", "q", "a", history=turns, number=2)]
    encoder = encoder_for(tokenizer, "alpaca")
    with pytest.raises(UsageError, match=r"^pairs.jsonl: line 2: data\.template: alpaca takes one user turn"):
        encoder.encode(rows, source="pairs.jsonl")
    assert [pair.number for pair in encoder.encode(rows, on_bad_row="skip")] == [1]
    assert list(encoder.report.skipped.values()) == [1]


def test_answer_that_the_tokenizer_drops():
    """With a template that ends answers with nothing: those of `load_template` have an end token."""
    from tokenizers import normalizers

    changed = build_tiny_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    alpaca = load_template("alpaca", changed)
    bare = SimpleNamespace(
        adds_special_tokens=alpaca.adds_special_tokens,
        render=lambda turn: replace(alpaca.render(turn), completion=turn.completion),
    )
    encoder = Encoder(changed, bare)
    rows = [Row("q", "\u200b", "q", "a", number=5), Row("q", "a", "q", "a", number=6)]
    with pytest.raises(UsageError, match=r"^pairs.jsonl: line 5: the answer has no tokens$"):
        encoder.encode(rows, source="pairs.jsonl")
    assert [pair.number for pair in encoder.encode(rows, on_bad_row="skip")] == [6]
    assert encoder.report.skipped == {"the answer has no tokens": 1}


def test_query_that_the_tokenizer_drops(tokenizer):
    from tokenizers import normalizers

    changed = build_tiny_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    rows = [Row("\u200b", "a", "q", "a", number=5)]
    with pytest.raises(UsageError, match=r"^data: row 5: the prompt has no tokens$"):
        encoder_for(changed).encode(rows)


# --- what a method trains on ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tokenizer) -> list[Pair]:
    rows = [Row(r["prompt"], r["completion"], r["prompt_en"], r["completion_en"], number=n)
            for n, r in enumerate(tiny_rows(40), 1)]  # fmt: skip
    return encoder_for(tokenizer).encode(rows)


def test_sft_trains_on_the_english_side(pairs):
    for ratio in (0.0, 0.5):
        examples = training_examples(pairs, METHODS["sft"], english_ratio=ratio)
        assert all(
            e.main is p.english and e.parallel is None and e.english_prompt
            for e, p in zip(examples, pairs, strict=True)
        )


@pytest.mark.parametrize("method", ["tft", "deep-supervision"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.33])
def test_replay_rows_are_english_and_the_others_the_methods(pairs, method, ratio):
    examples = training_examples(pairs, METHODS[method], english_ratio=ratio, seed=3)
    replay = replay_indices(len(pairs), ratio, 3)
    assert len(examples) == len(pairs)
    for index, (example, pair) in enumerate(zip(examples, pairs, strict=True)):
        if index in replay:
            assert example.main is pair.english
            assert example.parallel is None
            assert example.english_prompt
        else:
            assert example.main is pair.target
            assert example.parallel is (pair.english if method == "deep-supervision" else None)
            assert not example.english_prompt


def test_replay_is_the_same_for_every_method(pairs):
    tft, deep = (
        [example.english_prompt for example in training_examples(pairs, METHODS[method], english_ratio=0.25, seed=1)]
        for method in ("tft", "deep-supervision")
    )
    assert tft == deep
    assert sum(tft) == 10


def test_a_token_budget_takes_the_same_rows_first_for_every_method(pairs):
    """And replays the same ones of them: a larger budget, or a method with shorter rows, adds rows to the smaller one."""
    chosen = {}
    for method in METHODS:
        for budget in (200, 400):
            options = {"english_ratio": 0.25, "seed": 3}
            whole = training_examples(pairs, METHODS[method], **options)
            examples = training_examples(pairs, METHODS[method], token_budget=budget, **options)
            tokens, longest = examples.main_lengths.sum(), whole.main_lengths.max()
            assert budget - longest < tokens <= budget
            numbers = [example.number for example in examples]
            assert numbers == sorted(numbers), "in the order of the file"
            replayed = {example.number for example in whole if example.english_answer}
            assert {example.number for example in examples if example.english_answer} == replayed & set(numbers)
            chosen[method, budget] = set(numbers)
            exact = training_examples(pairs, METHODS[method], token_budget=int(tokens), **options)
            assert [example.number for example in exact] == numbers, "a budget may be used up to its last token"
    by_size = sorted(chosen.values(), key=len)
    assert all(small <= large for small, large in pairwise(by_size))
    assert len(by_size[0]) < len(by_size[-1])


def test_replay_indices_are_an_exact_share():
    for rows, ratio, count in ((100, 0.25, 25), (7, 0.25, 2), (3, 0.1, 0), (1000, 0.999, 999), (0, 0.5, 0)):
        chosen = replay_indices(rows, ratio, 0)
        assert len(chosen) == count
        assert chosen <= set(range(rows))
    assert replay_indices(100, 0.25, 0) == replay_indices(100, 0.25, 0)
    assert replay_indices(100, 0.25, 0) != replay_indices(100, 0.25, 1)


def test_side_that_the_method_needs_must_be_there(pairs):
    half = Pair(target=pairs[0].target, english=None)
    assert training_examples([half], METHODS["tft"])[0].main is half.target
    for method, ratio in (("sft", 0.0), ("deep-supervision", 0.0), ("tft", 0.99)):
        with pytest.raises(ValueError, match="lacks the side"):
            training_examples([half], METHODS[method], english_ratio=ratio)


def test_branch_lengths(byte_encoder):
    # Prompt 40 + 2, English query 30: the conversion branch reads 72 tokens.
    pair = byte_encoder(Limits(prompt=50)).encode([row_of(40, 3, 30, 3)])[0]
    deep = training_examples([pair], METHODS["deep-supervision"])
    check_branch_lengths(deep, 72)
    check_branch_lengths(deep, None)
    check_branch_lengths(training_examples([pair], METHODS["tft"]), 10)
    with pytest.raises(UsageError) as raised:
        check_branch_lengths(deep, 71)
    assert one_line(raised).startswith("a prompt and its English query take 72 tokens together and the model reads 71")


# --- validation split ----------------------------------------------------------------------------------------------


def numbered(count: int) -> list[Row]:
    return [Row("q", "a", "q", "a", number=number) for number in range(1, count + 1)]


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (30, 30), (0.05, 5), (0.3, 30), (0.994, 99), (99, 99)])
def test_split_is_disjoint_complete_and_in_order(size, count):
    rows = numbered(100)
    train, validation = split_validation(rows, size, 0)
    assert (len(train), len(validation)) == (100 - count, count)
    assert sorted(row.number for row in [*train, *validation]) == list(range(1, 101))
    for part in (train, validation):
        assert [row.number for row in part] == sorted(row.number for row in part)


def test_split_is_deterministic_and_drawn_from_everywhere():
    rows = numbered(1000)
    first, again, other = (list(split_validation(rows, 100, seed)[1]) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first[0].number < 200
    assert first[-1].number > 800


@pytest.mark.parametrize(("size", "asked"), [(8, 8), (9, 9), (0.99, 8)])
def test_validation_that_leaves_nothing_to_train_on(size, asked):
    with pytest.raises(UsageError) as raised:
        split_validation(numbered(8), size, 0)
    assert one_line(raised) == (
        f"data.validation: {asked} rows asked for, the data has 8; at least one must be left for training"
    )


def test_weights_are_how_often_a_row_is_seen():
    places = weighted_places([4, 10, 3, 0, 200], [2, 0.5, 1, 3, 1.25], 0)
    counts = [Counter(each.tolist()) for each in places]
    assert counts[0] == dict.fromkeys(range(4), 2)
    assert set(counts[1].values()) == {1}
    assert len(counts[1]) == 5
    assert set(counts[1]) <= set(range(4, 14))
    assert counts[2] == dict.fromkeys(range(14, 17), 1)
    assert not counts[3]
    assert set(counts[4]) == set(range(17, 217))
    assert sorted(counts[4].values()) == [1] * 150 + [2] * 50
    assert max(row for row, count in counts[4].items() if count == 2) > 150, "drawn from everywhere"
    again, other = weighted_places([4, 10], [2, 0.5], 0), weighted_places([4, 10], [2, 0.5], 1)
    assert [each.tolist() for each in again] == [each.tolist() for each in places[:2]]
    assert again[1].tolist() != other[1].tolist()
    assert [len(each) for each in weighted_places([5], [0.01], 0)] == [1], "a small share of a small file is one row"


def test_a_share_of_many_rows_is_capped_and_a_number_is_not():
    rows = numbered(20_000)
    assert len(split_validation(rows, 0.05, 0)[1]) == 500
    assert len(split_validation(rows, 1000, 0)[1]) == 1000


# --- preview -------------------------------------------------------------------------------------------------------


def encode_records(records, tokenizer, template="chat", limits=ROOMY) -> list[Pair]:
    return encoder_for(tokenizer, template, limits).encode(load_rows(records))


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("side", ["target", "english"])
def test_segments_are_the_decoded_sequence(template, side, tokenizer):
    for pair in encode_records(tiny_rows(8), tokenizer, template):
        encoded = getattr(pair, side)
        segments = preview(tokenizer, encoded)
        whole = tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
        assert "".join(segment.text for segment in segments) == whole
        assert sum(segment.num_tokens for segment in segments) == len(encoded.ids)
        assert [segment.role for segment in segments] == ["template", "query", "template", "answer"]


def test_roles_in_the_chat_template(tokenizer):
    row = tiny_rows(3)[2]
    (pair,) = encode_records([row], tokenizer)
    start, query, middle, answer = preview(tokenizer, pair.target)
    assert (start.text, query.text) == ("<|user|>\n", row["prompt"])
    assert (middle.text, answer.text) == ("<|end|>\n<|assistant|>\n", row["completion"] + "<|end|>")
    assert query.num_tokens == pair.target.num_query_tokens
    assert answer.num_tokens == pair.target.num_answer_tokens
    english = {segment.role: segment.text for segment in preview(tokenizer, pair.english)}
    assert english["query"] == row["prompt_en"]
    assert english["answer"] == row["completion_en"] + "<|end|>"


def test_what_was_cut_is_not_shown(tokenizer):
    row = tiny_rows(3)[2]
    (pair,) = encode_records([row], tokenizer, limits=Limits(prompt=12, completion=5))
    shown = {segment.role: segment for segment in preview(tokenizer, pair.target)}
    assert shown["answer"].num_tokens <= 5
    assert row["completion"].startswith(shown["answer"].text)
    assert row["prompt"].startswith(shown["query"].text)
    assert shown["query"].text != row["prompt"]


def test_a_part_without_tokens_is_left_out(tmp_path):
    tokenizer = build_tiny_tokenizer()
    path = tmp_path / "bare.jinja"
    path.write_text("{{ prompt }}\n{{ completion }}", encoding="utf-8")
    (pair,) = encode_records(tiny_rows(1), tokenizer, str(path))
    assert [segment.role for segment in preview(tokenizer, pair.target)] == ["query", "template", "answer"]
