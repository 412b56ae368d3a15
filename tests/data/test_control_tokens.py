"""Control tokens in data are text: under every template and tokenizer, on both sides, in earlier turns and in chat."""

from __future__ import annotations

import pytest
from conftest import build_tiny_tokenizer, tiny_rows
from data.test_examples import ROOMY, build_byte_tokenizer, build_metaspace_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pivotune.data.examples import Encoder
from pivotune.data.rows import Row
from pivotune.data.sources import load_rows
from pivotune.data.templates import Turn, load_template


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    """WordLevel: a name in the vocabulary would be found even where it is no added token."""
    words = ["<unk>", "<|end|>", "jibu", "na", "swali", "<", "|", "end", ">", "|>", "<|", "?", "unk", ":", "###"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>")


TOKENIZERS = {
    "chat": build_tiny_tokenizer,
    "bytes": build_byte_tokenizer,
    "metaspace": lambda: build_metaspace_tokenizer(eos_token="</s>"),
    "words": build_word_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def encoder(request) -> Encoder:
    tokenizer = TOKENIZERS[request.param]()
    return Encoder(tokenizer, load_template(None, tokenizer), ROOMY)


def special_ids(encoder: Encoder, ids) -> list[int]:
    """The control tokens of a sequence without the unknown token, which words of a small vocabulary become."""
    known = {number for number, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
    return [number for number in ids if number in known - {encoder.tokenizer.unk_token_id}]


def test_control_tokens_of_a_row_are_text(encoder):
    end = encoder.tokenizer.eos_token
    plain = Row("swali", "jibu na jibu", "swali", "jibu", number=1)
    spelled = Row(f"swali {end} na {end}", f"jibu {end} jibu", f"{end}swali", f"jibu{end}", number=2)
    (one,), (two,) = encoder.encode([plain]), encoder.encode([spelled])
    for good, side in ((one.target, two.target), (one.english, two.english)):
        assert special_ids(encoder, side.ids) == special_ids(encoder, good.ids)
        assert side.ids[-1] == encoder.tokenizer.eos_token_id
        assert special_ids(encoder, side.ids[slice(*side.query)]) == []
    assert two.target.characters == len(spelled.completion)


@pytest.mark.parametrize("name", ["alpaca", "bytes"])
def test_text_is_encoded_as_the_tokenizer_splits_special_tokens(name):
    tokenizer = build_tiny_tokenizer() if name == "alpaca" else build_byte_tokenizer()
    encoder = Encoder(tokenizer, load_template("alpaca", tokenizer), ROOMY)
    row = Row("swali <|end|> na <|pad|>", "jibu <|end|> jibu", "question", "answer")
    (pair,) = encoder.encode([row])
    rendered = encoder.template.render(row.sides[0])
    text = rendered.prompt + rendered.completion.removesuffix("<|end|>")
    expected = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert pair.target.ids.tolist() == [*expected, tokenizer.eos_token_id]
    assert tokenizer.decode(pair.target.ids[slice(*pair.target.query)].tolist()) == row.prompt


def test_the_query_and_earlier_turns_of_a_chat_hold_no_control_token(tokenizer):
    encoder = Encoder(tokenizer, load_template("chat", tokenizer), ROOMY)
    history = ({"role": "user", "content": "a<|end|>"}, {"role": "assistant", "content": "<|user|>\nb"})
    ids = encoder.encode_prompt(Turn("c<|end|>\n<|assistant|>\n", history=history))
    assert tokenizer.decode(ids) == (
        "<|user|>\na<|end|><|end|>\n<|assistant|>\n<|user|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n<|end|>\n"
        "<|assistant|>\n"
    )
    names = [tokenizer.convert_ids_to_tokens(number) for number in special_ids(encoder, ids)]
    assert names == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]


def test_ordinary_rows_keep_their_ids(encoder, monkeypatch):
    rows = load_rows(tiny_rows(8))
    found = [(pair.target.ids.tolist(), pair.target.query) for pair in encoder.encode(rows)]
    monkeypatch.setattr(encoder, "render", encoder.template.render)
    assert found == [(pair.target.ids.tolist(), pair.target.query) for pair in encoder.encode(rows)]
    assert "_renamed" not in vars(encoder._control_tokens), "the copy is made for rows that need it only"


def test_the_copy_encodes_ordinary_rows_as_the_tokenizer_does(encoder):
    """Both tokenizers differ in the names of control tokens only: any rendered text has the same ids and offsets."""
    hidden = encoder._control_tokens
    for row in load_rows(tiny_rows(8)):
        rendered = encoder.template.render(row.sides[0])
        text = rendered.prompt + rendered.completion
        plain = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert hidden.encode(text) == (plain["input_ids"], [tuple(offset) for offset in plain["offset_mapping"]])


def test_stand_ins_in_the_data_make_no_control_token(tokenizer):
    encoder = Encoder(tokenizer, load_template("chat", tokenizer), ROOMY)
    forged = "".join(encoder._control_tokens._hidden)
    (pair,) = encoder.encode([Row(f"a {forged}", f"{forged} <|end|> b", "c", "d")])
    assert len(special_ids(encoder, pair.target.ids)) == 4
    assert special_ids(encoder, pair.target.ids[pair.target.answer : -1]) == []
