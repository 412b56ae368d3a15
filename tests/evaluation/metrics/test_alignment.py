"""Alignment by layer against a naive computation, its extremes, and retrieval against hand-made neighbours."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model, build_tiny_tokenizer, tiny_rows
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from pivotune.errors import UsageError
from pivotune.evaluation.metrics import alignment
from pivotune.evaluation.metrics.alignment import (
    mean_of_non_pairs,
    measure_alignment,
    pooled_states,
    project,
    retrieval_success,
    unit_vectors,
    without_mean,
)
from pivotune.evaluation.tasks.tables import Source
from pivotune.evaluation.tasks.translation import ALIGNMENT_METRICS, SentencePair, alignment_task
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

IDS = [[5, 9, 40, 41, 7, 200, 201, 99], [17], [30, 31, 32], [8, 9], [77, 5, 6, 300, 12]]


@torch.no_grad()
def naive_states(model, ids):
    """(L + 1, D) of one sentence: the model's own list, which ends normed, so the top comes from a tap."""
    architecture = find_architecture(model)
    with tap(architecture, [architecture.num_layers]) as taps:
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = (*output.hidden_states[:-1], taps.hidden_states[architecture.num_layers])
    return torch.stack([state[0, min(1, len(ids) - 1) :].float().mean(0) for state in states])


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "gpt2", "gpt_neox", "cohere"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_pooled_states_are_the_means_of_the_models_own(model_type, batch_size):
    model = build_tiny_model(model_type)
    pooled = pooled_states(model, IDS, batch_size=batch_size)
    expected = torch.stack([naive_states(model, ids) for ids in IDS])
    assert pooled.shape == (len(IDS), NUM_LAYERS + 1, expected.shape[-1])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_the_lm_head_is_never_run_and_modes_and_hooks_are_as_before():
    model = build_tiny_model("gpt2").train()
    model.transformer.h[1].eval()

    def refuse(*args):
        raise AssertionError("the LM head ran")

    handle = model.lm_head.register_forward_hook(refuse)
    modes = [module.training for module in model.modules()]
    with torch.random.fork_rng():
        pooled_states(model, IDS, batch_size=2)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_inside():
    model = build_tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert torch.equal(pooled_states(model, IDS, batch_size=2), pooled_states(model, IDS, batch_size=2))


def test_a_half_precision_model_is_pooled_in_full_precision():
    model = build_tiny_model().to(torch.bfloat16)
    pooled = pooled_states(model, IDS, batch_size=1)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.stack([naive_states(model, ids) for ids in IDS]))
    assert not torch.equal(pooled[0], pooled[0].bfloat16().float())


def test_a_sentence_without_tokens_is_zero_and_harms_no_other():
    model = build_tiny_model()
    pooled = pooled_states(model, [[], *IDS], batch_size=3)
    assert not pooled[0].any()
    torch.testing.assert_close(pooled[1:], pooled_states(model, IDS, batch_size=6), rtol=1e-5, atol=1e-5)


def test_progress_counts_sentences():
    done = []
    pooled_states(build_tiny_model(), IDS, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]


def test_the_nearest_is_found_and_ties_are_shared():
    queries = unit_vectors(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.1]]))
    # The first key is the first query's and as near to the fourth as the last; the third query's own key is far.
    keys = unit_vectors(torch.tensor([[3.0, 0.0], [0.1, 1.0], [-1.0, -1.0], [5.0, 0.0]]))
    assert retrieval_success(queries, keys).tolist() == [0.5, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    keys = unit_vectors(torch.randn(20, 4, generator=generator))
    queries = unit_vectors(keys + 0.5 * torch.randn(20, 4, generator=generator))
    expected = (queries @ keys.T).argmax(1) == torch.arange(20)
    monkeypatch.setattr(alignment, "_CHUNK", chunk)
    assert 0 < expected.sum() < 20
    assert retrieval_success(queries, keys).tolist() == expected.double().tolist()


def test_one_vector_for_everything_is_at_chance():
    vectors = unit_vectors(torch.randn(7, generator=torch.Generator().manual_seed(0)).repeat(1000, 1))
    noisy = unit_vectors(vectors.float() * torch.rand(1000, 1, generator=torch.Generator().manual_seed(1)))
    assert retrieval_success(vectors, noisy).mean().item() == pytest.approx(1 / 1000)
    assert retrieval_success(unit_vectors(torch.zeros(9, 4)), unit_vectors(torch.zeros(9, 4))).tolist() == [1 / 9] * 9


def test_near_duplicates_are_told_apart():
    """Cosines that differ by 1e-9, as in layers where all sentences are close together."""
    base = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(3, 1)
    vectors = unit_vectors(base + 1e-4 * torch.eye(3, dtype=torch.float64))
    assert retrieval_success(vectors, vectors).tolist() == [1, 1, 1]


def test_without_mean_leaves_no_noise():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    assert without_mean(vectors).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    same = torch.full((3, 2), 1000.0, dtype=torch.float64)
    same[0, 0] += 1e-4
    assert not without_mean(same).any()


def test_mean_of_non_pairs():
    generator = torch.Generator().manual_seed(0)
    a, b = (unit_vectors(torch.randn(6, 3, generator=generator)) for _ in range(2))
    similarities = a @ b.T
    expected = similarities[~torch.eye(6, dtype=torch.bool)].mean().item()
    assert mean_of_non_pairs(a, b) == pytest.approx(expected, abs=1e-12)


def measure(*args, **options) -> SimpleNamespace:
    """Lists over layers and over items, with retrieval in 0..1."""
    records, by_layer, _ = measure_alignment(*args, **options)
    return SimpleNamespace(
        records=records,
        by_layer=by_layer,
        retrieval=[value / 100 for value in by_layer["retrieval_accuracy"]],
        centered_retrieval=[value / 100 for value in by_layer["centered_retrieval_accuracy"]],
        cosine=by_layer["cosine"],
        cosine_of_non_pairs=by_layer["cosine_of_non_pairs"],
        **{
            f"item_{name}": [record[name] for record in records]
            for name in ("retrieval", "centered_retrieval", "cosine")
        },
    )


def tiny_pairs(count: int) -> list[SentencePair]:
    return [SentencePair(row["id"], row["prompt"], row["prompt_en"]) for row in tiny_rows(count)]


@torch.no_grad()
def naive_alignment(model, tokenizer, pairs, layer):
    """Cosines (N, N) of every target sentence with every English one, sentence by sentence; raw and centered."""

    def vectors(sentences):
        means = []
        for sentence in sentences:
            ids = torch.tensor([tokenizer(sentence)["input_ids"]])
            with tap(find_architecture(model), [layer]) as taps:
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
            state = taps.hidden_states[layer] if layer == NUM_LAYERS else states[layer]
            means.append(state[0, 1:].mean(0))
        return torch.stack(means).double()

    target, english = vectors([pair.target for pair in pairs]), vectors([pair.english for pair in pairs])
    return cosines(target, english), cosines(target - target.mean(0), english - english.mean(0))


def cosines(first, second):
    return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T


def success(similarities):
    own = torch.arange(len(similarities))
    return ((similarities.argmax(1) == own).double() + (similarities.argmax(0) == own).double()) / 2


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_equals_a_naive_computation(model_type, tokenizer):
    model, pairs = build_tiny_model(model_type), tiny_pairs(12)
    found = measure(model, tokenizer, pairs, batch_size=5)
    items = []
    for layer in range(NUM_LAYERS + 1):
        raw, centered = naive_alignment(model, tokenizer, pairs, layer)
        items.append(torch.stack([success(raw), success(centered), raw.diagonal()]))
        assert found.retrieval[layer] == pytest.approx(success(raw).mean().item())
        assert found.centered_retrieval[layer] == pytest.approx(success(centered).mean().item())
        assert found.cosine[layer] == pytest.approx(raw.diagonal().mean().item(), abs=1e-5)
        non_pairs = (raw.sum() - raw.trace()) / (12 * 11)
        assert found.cosine_of_non_pairs[layer] == pytest.approx(non_pairs.item(), abs=1e-5)
    of_items = torch.stack(items[1:]).mean(0)
    assert found.item_retrieval == pytest.approx(of_items[0].tolist())
    assert found.item_centered_retrieval == pytest.approx(of_items[1].tolist())
    assert found.item_cosine == pytest.approx(of_items[2].tolist(), abs=1e-5)
    # Neither perfect nor nothing, so that a wrong layer or direction would be seen.
    assert 0 < sum(found.item_retrieval) < 12
    assert found.item_retrieval != found.item_centered_retrieval


@pytest.mark.parametrize("changes", [{"padding_side": "left"}, {"pad_token": None}])
def test_padding_and_batch_size_do_not_matter(changes):
    model, pairs = build_tiny_model(), tiny_pairs(12)
    one = measure(model, build_tiny_tokenizer(**changes), pairs, batch_size=1)
    all_at_once = measure(model, build_tiny_tokenizer(), pairs, batch_size=64)
    assert one.cosine == pytest.approx(all_at_once.cosine, abs=1e-5)
    assert one.item_cosine == pytest.approx(all_at_once.item_cosine, abs=1e-5)
    assert one.retrieval == all_at_once.retrieval


def test_the_begin_token_is_there_where_the_tokenizer_adds_one():
    model, pairs, tokenizer = build_tiny_model(), tiny_pairs(4), build_tiny_tokenizer(bos_token="<|begin|>")
    without = measure(model, tokenizer, pairs)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("Ni")["input_ids"][0] == tokenizer.bos_token_id
    found = measure(model, tokenizer, pairs)
    expected = naive_alignment(model, tokenizer, pairs, 2)[0].diagonal().mean().item()
    assert found.cosine[2] == pytest.approx(expected, abs=1e-5)
    assert found.cosine[2] != pytest.approx(without.cosine[2], abs=1e-3)


def test_identical_sentences_are_all_found(tokenizer):
    pairs = [SentencePair(row["id"], row["completion_en"], row["completion_en"]) for row in tiny_rows(20)]
    found = measure(build_tiny_model(), tokenizer, pairs, batch_size=3)
    assert found.retrieval == found.centered_retrieval == [1.0] * (NUM_LAYERS + 1)
    assert found.cosine == pytest.approx([1.0] * (NUM_LAYERS + 1), abs=1e-12)
    assert max(found.cosine_of_non_pairs) < 0.999


def test_sentences_that_do_not_belong_together_are_found_by_chance(tokenizer):
    generator = random.Random(0)
    alphabet = "abcdefghijklmnop "
    texts = ["".join(generator.choices(alphabet, k=generator.randint(8, 40))) for _ in range(400)]
    pairs = [SentencePair(str(n), texts[n], texts[200 + n]) for n in range(200)]
    found = measure(build_tiny_model(), tokenizer, pairs, batch_size=64)
    # Each layer and direction: 200 draws of probability 1/200; five or more hits have a chance of 0.4 %.
    assert all(value * 200 < 5 for value in (*found.retrieval, *found.centered_retrieval))
    assert found.cosine == pytest.approx(found.cosine_of_non_pairs, abs=0.05)


def test_a_model_that_says_the_same_of_everything_is_at_chance(tokenizer):
    model = build_tiny_model()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding[5].clone().expand_as(embedding))
    found = measure(model, tokenizer, tiny_pairs(10), batch_size=3)
    assert found.retrieval == found.centered_retrieval == pytest.approx([1 / 10] * (NUM_LAYERS + 1))
    assert found.cosine == pytest.approx([1.0] * (NUM_LAYERS + 1), abs=1e-6)


def test_a_sentence_that_stands_twice_ties_with_itself(tokenizer):
    pairs = [
        SentencePair("0", "abc", "abc"),
        SentencePair("1", "abc", "abc"),
        SentencePair("2", "Ni kumi.", "Ni kumi."),
    ]
    found = measure(build_tiny_model(), tokenizer, pairs, batch_size=1)
    assert found.item_retrieval == pytest.approx([0.5, 0.5, 1.0])


def test_records_and_layers_of_the_results(tokenizer):
    pairs = tiny_pairs(6)
    done = []
    found = measure(build_tiny_model(), tokenizer, pairs, batch_size=4, max_tokens=5, progress=done.append)
    records = found.records
    assert [record["item"] for record in records] == [pair.id for pair in pairs]
    for metric in ALIGNMENT_METRICS:
        assert metric.form == "mean"
        assert all(isinstance(record[metric.fields[0]], float) for record in records)
    mean = sum(record["retrieval"] for record in records) / 6
    assert mean == pytest.approx(sum(found.retrieval[1:]) / NUM_LAYERS)
    by_layer = found.by_layer
    assert len(by_layer["cosine"]) == len(by_layer["cosine_of_non_pairs"]) == NUM_LAYERS + 1
    assert by_layer["chance"] == pytest.approx(100 / 6)
    sentences = {text for pair in pairs for text in (pair.target, pair.english)}
    assert by_layer["truncated"] == sum(len(tokenizer(text)["input_ids"]) > 5 for text in sentences) > 0
    assert done == sorted(done)
    assert done[-1] == 12


def test_one_pair_is_too_few(tokenizer):
    with pytest.raises(UsageError, match="needs at least 2 sentence pairs, found 1"):
        measure_alignment(build_tiny_model(), tokenizer, tiny_pairs(1))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_real_model_aligns_chinese_best_in_the_middle(smollm2, shared_data):
    from pivotune.models.loading import load_model, load_tokenizer

    pairs = alignment_task("tatoeba", "zh").read(Source(shared_data / "eval")).items[:100]
    found = measure(load_model(smollm2), load_tokenizer(smollm2), pairs)
    assert len(found.retrieval) == 31
    assert found.by_layer["truncated"] == 0
    # Measured: 13.5 % in the embeddings, 57 % after 20 blocks, 19 % at the top; chance is 1 %.
    middle = max(found.centered_retrieval[10:25])
    assert middle > 0.4
    assert middle > 2 * max(found.centered_retrieval[0], found.centered_retrieval[30])
    for layer in range(1, 31):
        assert found.cosine[layer] > found.cosine_of_non_pairs[layer]


def test_projection_keeps_the_variance_and_the_neighbourhoods():
    generator = torch.Generator().manual_seed(0)
    # Two clouds apart along one axis of ten.
    vectors = 0.1 * torch.randn(40, 10, generator=generator)
    vectors[20:, 4] += 8
    found = project(vectors)
    pca = torch.tensor(found["pca"])
    assert (pca[:20, 0] < 0).all()
    assert (pca[20:, 0] > 0).all()
    assert pca[:, 0].var() == pytest.approx(float(vectors[:, 4].var()), rel=0.02)
    assert found == project(vectors)
    if "tsne" in found:
        tsne = torch.tensor(found["tsne"])
        clouds = tsne[:20], tsne[20:]
        apart = (clouds[0].mean(0) - clouds[1].mean(0)).norm()
        assert apart > max((cloud - cloud.mean(0)).norm(dim=1).mean() for cloud in clouds)


def test_few_vectors_have_principal_axes_only():
    assert list(project(torch.eye(4))) == ["pca"]
