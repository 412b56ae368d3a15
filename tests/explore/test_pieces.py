from __future__ import annotations

import pytest
from conftest import build_tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from pivotune.explore.pieces import Pieces, visible

TEXTS = ["Tiếng Việt ế ằ", "中文，可以", "السلام عليكم", "emoji 👩‍👩‍👧 end", "e\u0301", "naïve\n\tx"]


@pytest.fixture(scope="module")
def byte_level():
    return build_tiny_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as those of Llama 2 and Gemma: words with `▁`, and bytes for characters that it lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    for piece in ("▁", "T", "i", "n", "g", "▁T"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "T")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_columns_join_to_the_text(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    columns = Pieces(tokenizer).columns(ids)
    assert "".join(column.text for column in columns).replace("◌", "").replace("⟨U+200D⟩", "\u200d") == text
    assert sum(column.span for column in columns) == len(ids)
    assert any(column.span > 1 for column in columns) == (not text.isascii())


def test_a_character_of_several_tokens_is_one_column(byte_level):
    ids = byte_level("aếb", add_special_tokens=False)["input_ids"]
    assert [tuple(column) for column in Pieces(byte_level).columns(ids)] == [("a", 1), ("ế", len(ids) - 2), ("b", 1)]


def test_a_predicted_piece_forms_a_character_with_its_context(byte_level):
    pieces = Pieces(byte_level)
    first, second, last = byte_level("ế", add_special_tokens=False)["input_ids"]
    pending = pieces.pending([first, second])
    assert pieces.formed(pending[-1], last) == "ế"
    assert pieces.formed(b"", first) == r"\xe1"
    assert pieces.formed(pending[0], second) == r"\xe1\xba"
    # Another beginning, or a letter, does not go on with it.
    assert pieces.formed(pending[-1], first) == r"\xe1"
    assert pieces.formed(pending[-1], byte_level.convert_tokens_to_ids("a")) == "a"


def test_an_output_row_without_a_token_is_shown_by_its_number(byte_level):
    assert Pieces(byte_level).formed(b"", 10_000) == "⟨token 10000⟩"


def test_special_tokens_are_whole(byte_level):
    ids = [*byte_level("ế", add_special_tokens=False)["input_ids"][:1], byte_level.eos_token_id]
    assert [tuple(column) for column in Pieces(byte_level).columns(ids)] == [(r"\xe1<|end|>", 2)]


def test_cut_inside_a_character_shows_its_bytes(byte_level):
    ids = byte_level("aế", add_special_tokens=False)["input_ids"][:-1]
    assert [tuple(column) for column in Pieces(byte_level).columns(ids)] == [("a", 1), (r"\xe1\xba", 2)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u202eabc\u2066", "⟨U+202E⟩abc⟨U+2066⟩"),
        ("a\x00b", "a⟨U+0000⟩b"),
        ("\u200b", "⟨U+200B⟩"),
        ("\ufffd", "⟨U+FFFD⟩"),
        ("\u200c", "⟨U+200C⟩"),
        ("می\u200cشود", "می\u200cشود"),
        ("\u0301", "\u25cc\u0301"),
        ("<script>", "<script>"),
        ("\u2028", "⟨U+2028⟩"),
    ],
)
def test_hidden_characters_are_marked(text, shown):
    assert visible(text.encode()) == shown
