from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from conftest import NUM_LAYERS, VOCABULARY, build_tiny_model, build_tiny_tokenizer
from tiny_batches import hook_count
from tiny_training import make_pairs

from pivotune.data.examples import Pair, Side
from pivotune.errors import UsageError
from pivotune.layers import measure
from pivotune.layers.measure import analyze_layers, english_looking_tokens, num_sequences
from pivotune.layers.selection import select_layers
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

PAIRS = make_pairs(9)


@torch.no_grad()
def entropies(model, sides: list[Side]) -> tuple[torch.Tensor, int]:
    """Mean entropy per layer over query and answer tokens, each row alone and without padding; and how many tokens."""
    architecture = find_architecture(model)
    rows = []
    for side in sides:
        ids = torch.from_numpy(side.ids).long()[None]
        with tap(architecture, range(NUM_LAYERS + 1)) as taps:
            model(input_ids=ids)
        counted = [*range(*side.query), *range(side.answer, len(side.ids))]
        states = torch.stack([taps.hidden_states[layer][0, counted] for layer in range(NUM_LAYERS + 1)])
        log_p = lens_logits(architecture, states).double().log_softmax(-1)
        rows.append(-(log_p.exp() * log_p).sum(-1))
    whole = torch.cat(rows, dim=1)
    return whole.mean(dim=1), whole.shape[1]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_both_sides_equal_every_row_alone(batch_size):
    model = build_tiny_model()
    analysis = analyze_layers(
        model,
        build_tiny_tokenizer(),
        PAIRS,
        model_name="tiny",
        language="sw",
        batch_size=batch_size,
        tokens_per_row=None,
    )
    for side in ("target", "english"):
        expected, tokens = entropies(model, [getattr(pair, side) for pair in PAIRS])
        assert analysis[side]["entropy"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert (analysis[side]["tokens"], analysis[side]["sequences"]) == (tokens, 9)
    assert analysis["target"]["entropy"] != analysis["english"]["entropy"]
    assert (analysis["model"], analysis["language"], analysis["num_layers"]) == ("tiny", "sw", NUM_LAYERS)


def test_layers_follow_from_the_target_profile_and_its_noise(monkeypatch):
    called = []
    monkeypatch.setattr(
        measure, "select_layers", lambda *arguments: called.append(arguments) or select_layers(*arguments)
    )
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS)
    assert called == [(analysis["target"]["entropy"], analysis["target"]["entropy_stderr"])]
    selection = select_layers(*called[0])
    assert {name: analysis[name] for name in ("conversion", "thinking", "method", "reason")} == {
        name: value for name, value in selection.to_dict().items() if name not in ("falls", "reasons")
    }


def test_template_tokens_do_not_count():
    """They are read by the model but not measured."""
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS, tokens_per_row=None)
    expected = sum(pair.target.num_query_tokens + pair.target.num_answer_tokens for pair in PAIRS)
    assert analysis["target"]["tokens"] == expected < sum(len(pair.target.ids) for pair in PAIRS)


def test_tokens_of_a_row_are_limited():
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS, tokens_per_row=3)
    counts = [pair.target.num_query_tokens + pair.target.num_answer_tokens for pair in PAIRS]
    assert analysis["target"]["tokens"] == sum(min(3, count) for count in counts) < sum(counts)


def test_rows_without_english():
    pairs = [Pair(PAIRS[0].target, PAIRS[0].english), *(Pair(pair.target, None) for pair in PAIRS[1:])]
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), pairs)
    assert analysis["english"]["sequences"] == 1
    assert num_sequences(pairs) == 10
    alone = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), pairs[1:])
    assert alone["english"] is None
    with pytest.raises(UsageError, match="needs rows with a target-language prompt"):
        analyze_layers(build_tiny_model(), build_tiny_tokenizer(), [Pair(None, PAIRS[0].english)])


def test_progress_goes_through_both_languages():
    done: list[int] = []
    analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS, batch_size=4, progress=done.append)
    assert done == [4, 8, 9, 13, 17, 18]
    assert done[-1] == num_sequences(PAIRS)


def test_both_languages_are_read_through_the_lens():
    """This one maps all states to zero: the head gives a uniform distribution."""
    model = build_tiny_model()
    plain = analyze_layers(model, build_tiny_tokenizer(), PAIRS)
    through = analyze_layers(model, build_tiny_tokenizer(), PAIRS, lens=lambda states, layer: 0.0 * states)
    for side in ("target", "english"):
        assert through[side]["entropy"][:-1] == pytest.approx([math.log(VOCABULARY)] * NUM_LAYERS)
        assert through[side]["entropy"][-1] == plain[side]["entropy"][-1]


def test_model_is_left_as_it_was():
    model = build_tiny_model().train()
    analyze_layers(model, build_tiny_tokenizer(), PAIRS)
    assert model.training
    assert hook_count(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


class TestEnglishLookingTokens:
    greek = ("Ποιο είναι το νόμισμα της Ελλάδας;", "Το ευρώ (EUR).")

    def test_byte_level_tokens_are_decoded_one_by_one(self):
        tokenizer = build_tiny_tokenizer()
        english, reason = english_looking_tokens(tokenizer, self.greek)
        assert english is not None
        assert english.dtype == torch.bool
        assert len(english) == len(tokenizer)
        marked = {tokenizer.decode([index]) for index in english.nonzero().flatten().tolist()}
        assert {" number", "umber", "ks"} & marked
        assert any(text.startswith(" ") for text in marked)
        assert all(sum(c.isascii() and c.isalpha() for c in text) >= 2 for text in marked)
        assert f"{len(marked)} tokens" in reason
        assert not english[tokenizer.all_special_ids].any()

    def test_tokens_of_bytes_of_other_scripts_are_not_english(self):
        """In a byte-level vocabulary "Îij" is two bytes of a Greek letter and looks like letters."""
        tokenizer = build_tiny_tokenizer()
        tokenizer.add_tokens(["English"])
        english, _ = english_looking_tokens(tokenizer, self.greek)
        assert english is not None
        vocabulary = tokenizer.get_vocab()
        for token, index in vocabulary.items():
            if "\ufffd" in tokenizer.convert_tokens_to_string([token]):
                assert not english[index]
        assert not english[vocabulary["English"]]  # added by hand, not learnt by the model

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("the", True), (" the", True), ("e1", False), ("it's", True), ("né", False), ("中文ab", False), ("ab�", False),
         ("नab", False), ("12", False), ("ab“", True), ("", False)],
    )  # fmt: skip
    def test_what_looks_english(self, text, expected):
        assert self.marks(text) is expected

    def marks(self, text):
        class OneToken:
            added_tokens_decoder: ClassVar = {}
            all_special_ids: ClassVar = [0]

            def get_vocab(self):
                return {"<s>": 0, "token": 1}

            def convert_tokens_to_string(self, tokens):
                return text if tokens == ["token"] else "special"

        english, _ = english_looking_tokens(OneToken(), TestEnglishLookingTokens.greek)
        assert english is not None
        assert not english[0]
        return bool(english[1])

    def test_ids_may_have_holes(self):
        tokenizer = build_tiny_tokenizer()
        vocabulary = tokenizer.get_vocab()
        tokenizer.get_vocab = lambda: {token: 2 * index for token, index in vocabulary.items()}
        english, _ = english_looking_tokens(tokenizer, self.greek)
        assert english is not None
        assert len(english) == 2 * max(vocabulary.values()) + 1

    @pytest.mark.parametrize("text", ["Đồng tiền của Việt Nam là gì?", "Namba ni ipi?", "Währung", "Euro ευρώ euro"])
    def test_latin_script_cannot_be_told(self, text):
        english, reason = english_looking_tokens(build_tiny_tokenizer(), [text])
        assert english is None
        assert "Latin" in reason

    @pytest.mark.parametrize("text", ["中国的货币是什么？RMB", "ما هي عملة مصر؟", "भारत की मुद्रा", "Валюта (RUB)"])
    def test_other_scripts_can(self, text):
        english, reason = english_looking_tokens(build_tiny_tokenizer(), [text])
        assert english is not None
        assert "not Latin" in reason

    def test_texts_without_letters(self):
        english, reason = english_looking_tokens(build_tiny_tokenizer(), ["12 + 3", ""])
        assert english is None
        assert "no letters" in reason
