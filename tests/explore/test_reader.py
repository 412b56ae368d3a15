from __future__ import annotations

import json

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model, build_tiny_tokenizer
from safetensors.numpy import save_file
from tiny_training import make_pairs

from pivotune.data.examples import Encoder, Limits
from pivotune.data.rows import Row
from pivotune.data.templates import load_template
from pivotune.errors import UsageError
from pivotune.explore.reader import LensReader, PlainText, ReadModel, find_lens
from pivotune.lenses.tuned import TunedLens
from pivotune.models.architecture import find_architecture

ROW = Row("Namba ế ni ipi?", "Ni moja.", "Which number?", "It is one.", number=3)
TYPED = Row("Namba 1 ni ipi?", "", "", "", number=1)


@pytest.fixture(scope="module")
def model() -> ReadModel:
    return ReadModel("tiny", build_tiny_model())


def encoder(limits=None, template=None) -> Encoder:
    tokenizer = build_tiny_tokenizer()
    return Encoder(tokenizer, template or load_template(None, tokenizer), limits or Limits())


def test_a_row_is_read_in_both_languages_from_the_query_on(model):
    item = LensReader([model], encoder()).read(ROW)
    text, english = item["sides"]
    assert (text["name"], text["prompt"], text["answer"]) == ("text", "Namba ế ni ipi?", "Ni moja.")
    assert (english["name"], english["prompt"], english["answer"]) == ("English", "Which number?", "It is one.")
    assert text["hidden"] == 2  # <|user|> and the line end
    written = "".join(column[0] for column in text["columns"])
    assert written == "Namba ế ni ipi?<|end|>\n<|assistant|>\nNi moja.<|end|>"
    roles = {
        role: "".join(column[0] for column in text["columns"] if column[2] == role)
        for role in ("query", "template", "answer")
    }
    assert roles == {"query": "Namba ế ni ipi?", "template": "<|end|>\n<|assistant|>\n", "answer": "Ni moja.<|end|>"}
    assert sum(column[1] for column in text["columns"]) == text["positions"]
    assert ["ế", 3, "query"] in text["columns"]


def test_the_output_row_is_what_the_model_says_next(model):
    reader = LensReader([model], encoder())
    side = reader.read(ROW)["sides"][0]
    [pair] = reader.encoder.encode([ROW])
    with torch.no_grad():
        logits = model.model(input_ids=torch.from_numpy(pair.target.ids).long()[None]).logits[0, side["hidden"] :]
    grid, first = side["grids"][0]["logit"], NUM_LAYERS * side["positions"]
    assert len(grid["likeliest"]) == (NUM_LAYERS + 1) * side["positions"]
    expected = logits.softmax(-1).topk(10)
    found = torch.tensor(grid["probabilities"]).view(NUM_LAYERS + 1, side["positions"], 10)[-1]
    torch.testing.assert_close(found, expected.values, rtol=6e-3, atol=1e-6)
    for place, ids in enumerate(expected.indices.tolist()):
        for rank, token in enumerate(ids):
            text = side["texts"][grid["likeliest"][first + place][rank]]
            # Most tokens of this vocabulary are bytes, which join with their context.
            decoded = reader.encoder.tokenizer.decode([token]) or f"⟨token {token}⟩"
            assert text == decoded or "\ufffd" in decoded or not decoded.isprintable()


def test_no_token_is_shown_as_a_replacement_character(model):
    text = json.dumps(LensReader([model], encoder()).read(ROW), ensure_ascii=False)
    assert "\ufffd" not in text
    assert "\\\\x" in text  # parts of characters as bytes


def test_a_prompt_without_an_answer_gets_the_greedy_one(model):
    item = LensReader([model], encoder(), max_new_tokens=5).read(TYPED)
    [side] = item["sides"]
    ids = encoder().encode_prompt(TYPED.sides[0])
    output = model.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert side["answer"] == encoder().tokenizer.decode(output, skip_special_tokens=True)
    assert side["positions"] + side["hidden"] == len(ids) + len(output)
    assert item["notes"] == ["answer of tiny"]


def test_two_models_have_two_grids_and_their_difference(model):
    other = ReadModel("other", build_tiny_model(seed=1))
    reader = LensReader([model, other], encoder(), max_new_tokens=4)
    first, second = (reader.read(TYPED, answered_by=place)["sides"][0] for place in (0, 1))
    assert first["answer"] != second["answer"]
    assert first["grids"][0] != first["grids"][1]
    assert len(first["differences"]["logit"]["kl"]) == (NUM_LAYERS + 1) * first["positions"]
    top = [grid["logit"]["probabilities"][::10] for grid in first["grids"]]
    same = [a[0] == b[0] for a, b in zip(*(grid["logit"]["likeliest"] for grid in first["grids"]), strict=True)]
    for mine, others, change, equal in zip(*top, first["differences"]["logit"]["change"], same, strict=True):
        assert change == pytest.approx(mine - others, abs=2e-3) or not equal


def test_every_lens_of_every_text_is_reported(model, tmp_path):
    lens, seen = find_lens(model, tmp_path, make_pairs(30), "rows")[0], []
    reader = LensReader([model, model], encoder(), lens, on_lens=lambda: seen.append(1))
    reader.read(ROW)
    assert len(seen) == 2 * 2  # two languages and lenses


def test_plain_text_has_no_template(model):
    [side] = LensReader([model], encoder(template=PlainText()), max_new_tokens=3).read(TYPED)["sides"]
    assert side["hidden"] == 0
    assert {column[2] for column in side["columns"]} == {"query", "answer"}


def test_long_texts_are_cut_and_the_page_says_so(model):
    row = Row("ndio " * 20_000, "Ni " * 100, "", "", number=1)
    item = LensReader([model], encoder(Limits(250, 8)), max_tokens=10).read(row)
    assert item["notes"] == ["the prompt is cut to 10 tokens", "the answer is cut to 8 tokens"]
    assert [sum(c[1] for c in item["sides"][0]["columns"] if c[2] == role) for role in ("query", "answer")] == [10, 8]
    assert len(item["label"]) <= 61


def test_hostile_text_is_marked(model):
    item = LensReader([model], encoder()).read(Row("a\u202eb\x00<script>\u200b", "c", "", "", number=1))
    assert item["sides"][0]["prompt"] == item["label"] == "a⟨U+202E⟩b⟨U+0000⟩<script>⟨U+200B⟩"
    assert not {"\u202e", "\x00", "\u200b"} & set(json.dumps(item, ensure_ascii=False))


def test_arabic_runs_from_right_to_left(model):
    reader = LensReader([model], encoder(), max_new_tokens=1)
    for prompt, expected in (("ما هي؟", True), ("١ ما", True), ("mji ما", False), ("12", False)):
        assert reader.read(Row(prompt, "", "", "", number=1))["sides"][0]["rtl"] is expected


def lens_arrays(model: ReadModel, layers) -> dict:
    lens = TunedLens(find_architecture(model.model))
    lens.maps = {k: (torch.eye(32) * k, torch.ones(32)) for k in layers}
    return lens.to_arrays()


def test_the_lens_of_a_run_is_used_where_it_has_every_layer(model, tmp_path):
    save_file(lens_arrays(model, range(NUM_LAYERS)), tmp_path / "lens.safetensors")
    lens, sentence = find_lens(model, tmp_path, [], "")
    assert lens.maps[2][0][0, 0] == 2
    assert str(tmp_path / "lens.safetensors") in sentence


def test_a_lens_of_two_layers_is_fitted_anew_on_rows(model, tmp_path):
    save_file(lens_arrays(model, (1, 3)), tmp_path / "lens.safetensors")
    pairs = make_pairs(30)
    lens, sentence = find_lens(model, tmp_path, pairs, "pairs.jsonl")
    assert sorted(lens.maps) == list(range(NUM_LAYERS))
    assert lens.maps[1][1][0] != 1
    assert "30 rows of pairs.jsonl" in sentence
    item = LensReader([model], encoder(), lens).read(ROW)
    assert list(item["sides"][0]["grids"][0]) == ["logit", "tuned"]


def test_without_enough_rows_there_is_the_logit_lens_alone(model, tmp_path):
    sentence = "Logit lens only: no rows to fit a tuned one on. Middle layers are hard to read through it."
    assert find_lens(model, tmp_path, [], "") == (None, sentence)
    lens, sentence = find_lens(model, tmp_path, make_pairs(1), "one.jsonl")
    assert lens is None
    assert "one.jsonl has 11 token states beside the texts shown, and 100 are needed" in sentence


def test_a_damaged_lens_is_one_line(model, tmp_path):
    (tmp_path / "lens.safetensors").write_bytes(b"not a lens")
    with pytest.raises(UsageError, match=r"lens\.safetensors: not a readable lens .* --lens logit"):
        find_lens(model, tmp_path, [], "")
