"""The streamed profile against a naive one that keeps everything, on every architecture."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from conftest import NUM_LAYERS, VOCABULARY, build_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pivotune.errors import UsageError
from pivotune.layers.profile import BlockSize, profile_layers
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

COLUMNS = 112  # of a block of logits; no other dimension of the tiny models has this size
ENGLISH = torch.arange(VOCABULARY) % 3 == 0


def batches(sizes=((3, 9), (2, 14)), seed=0):
    """Right-padded batches; the first two tokens of a row (its "template") and one in five others do not count."""
    generator = torch.Generator().manual_seed(seed)
    for rows, tokens in sizes:
        lengths = torch.randint(4, tokens + 1, (rows, 1), generator=generator)
        attention_mask = (torch.arange(tokens) < lengths).long()
        token_mask = (torch.rand(rows, tokens, generator=generator) < 0.8) & (torch.arange(tokens) >= 2)
        input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
        yield {"input_ids": input_ids, "attention_mask": attention_mask, "token_mask": token_mask}


@torch.no_grad()
def naive_profile(model, data):
    """Entropy, agreement, English share (layers, tokens), and the sequence of each token, all kept at once."""
    architecture = find_architecture(model)
    entropy, agreement, share, sequences = [], [], [], []
    for number, batch in enumerate(data):
        with tap(architecture, range(architecture.num_layers + 1)) as taps:
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        states = torch.stack([taps.hidden_states[layer] for layer in range(architecture.num_layers + 1)])
        logits = lens_logits(architecture, states).float()
        log_p = logits.log_softmax(-1)
        counted = (batch["token_mask"] & batch["attention_mask"].bool()).nonzero().tolist()
        for row, position in counted:
            here = log_p[:, row, position].double()
            entropy.append(-(here.exp() * here).sum(-1))
            agreement.append((here.argmax(-1) == output[row, position].argmax()).double())
            share.append(here.exp()[:, ENGLISH].sum(-1))
            sequences.append((number, row))
    return torch.stack(entropy, 1), torch.stack(agreement, 1), torch.stack(share, 1), sequences


@pytest.mark.parametrize("block", [BlockSize(7, 100), BlockSize(4, VOCABULARY), None])
def test_equals_the_naive_profile(distinct_family, block):
    model = build_tiny_model(distinct_family)
    entropy, agreement, share, sequences = naive_profile(model, batches())
    profile = profile_layers(model, batches(), english_tokens=ENGLISH, block=block)
    assert profile.num_layers == NUM_LAYERS
    assert (profile.tokens, profile.sequences) == (entropy.shape[1], len(set(sequences)))
    assert profile.entropy == pytest.approx(entropy.mean(1).tolist(), rel=2e-6)
    assert profile.agreement == pytest.approx(agreement.mean(1).tolist(), abs=1e-12)
    assert profile.english_share == pytest.approx(share.mean(1).tolist(), rel=2e-6)
    assert profile.agreement[-1] == 1.0
    # The layers differ by more than the tolerance, so a layer in another's place would be seen.
    assert min(abs(a - b) for a, b in combinations(profile.english_share, 2)) > 1e-5


def test_lower_layers_agree_with_the_output_on_some_tokens_only():
    agreement = profile_layers(build_tiny_model(), batches([(8, 30)])).agreement
    assert all(0 < share < 1 for share in agreement[1:-1])


def test_standard_error_is_the_one_over_sequences():
    model = build_tiny_model()
    entropy, _, _, sequences = naive_profile(model, batches())
    profile = profile_layers(model, batches())
    names = sorted(set(sequences))
    residuals = torch.zeros(NUM_LAYERS + 1, len(names), dtype=torch.float64)
    for token, name in enumerate(sequences):
        residuals[:, names.index(name)] += entropy[:, token] - entropy.mean(1)
    n = len(names)
    expected = (n / (n - 1) * residuals.square().sum(1)).sqrt() / entropy.shape[1]
    assert profile.entropy_stderr == pytest.approx(expected.tolist(), rel=1e-3)


def test_standard_error_of_equally_long_sequences_is_that_of_their_means():
    model = build_tiny_model()
    ids = torch.randint(3, VOCABULARY, (6, 8))
    ones = torch.ones_like(ids)
    profile = profile_layers(model, [{"input_ids": ids, "attention_mask": ones, "token_mask": ones.bool()}])
    means = naive_profile(model, [{"input_ids": ids, "attention_mask": ones, "token_mask": ones.bool()}])[0]
    means = means.view(NUM_LAYERS + 1, 6, 8).mean(2)
    assert profile.entropy_stderr == pytest.approx((means.std(1) / math.sqrt(6)).tolist(), rel=1e-4)


def test_one_sequence_has_no_standard_error():
    profile = profile_layers(build_tiny_model(), batches([(1, 9)]))
    assert profile.entropy_stderr is None
    assert profile.english_share is None


def test_batching_does_not_matter():
    model = build_tiny_model()
    together = list(batches([(5, 12)]))
    apart = [{name: tensor[row : row + 1] for name, tensor in together[0].items()} for row in range(5)]
    first, second = profile_layers(model, together), profile_layers(model, apart)
    assert first.entropy == pytest.approx(second.entropy, rel=1e-5)
    assert first.entropy_stderr == pytest.approx(second.entropy_stderr, rel=1e-4)
    assert (first.tokens, first.sequences) == (second.tokens, second.sequences)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made, and of the largest with a block's columns as its last dimension."""

    def __init__(self, model):
        super().__init__()
        self.any = self.logits = 0
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.weights:
            self.any = max(self.any, result.numel())
            if result.ndim and result.shape[-1] in (COLUMNS, VOCABULARY):
                self.logits = max(self.logits, result.numel())
        return result


@pytest.mark.parametrize("num_layers", [2, 6])
@pytest.mark.parametrize("tokens", [40, 160])
def test_memory_grows_neither_with_layers_nor_with_tokens(num_layers, tokens):
    model = build_tiny_model("llama", num_hidden_layers=num_layers)
    with LargestTensor(model) as largest:
        profile_layers(model, batches([(2, tokens)]), english_tokens=ENGLISH, block=BlockSize(8, COLUMNS))
    # The forward pass itself makes one row of logits for each of two sequences.
    assert largest.logits == max(8 * COLUMNS, 2 * VOCABULARY)
    # Attention of the model's own pass: rows x heads x tokens x tokens. The states: layers x tokens x width.
    assert largest.any <= max(2 * 4 * tokens * tokens, (num_layers + 1) * 2 * tokens * 32)


def test_measures_at_most_the_asked_tokens_of_each_sequence_evenly_spread(monkeypatch):
    model = build_tiny_model()
    ids = torch.randint(3, VOCABULARY, (3, 12))
    ones = torch.ones_like(ids)
    masks = [ones.bool().clone() for _ in range(2)]
    masks[0][1, 2:] = False  # two counted tokens only
    masks[0][2] = False
    masks[1] = torch.zeros_like(ids, dtype=torch.bool)
    masks[1][0, [2, 5, 8, 11]] = True
    masks[1][1, :2] = True
    expected, found = (
        profile_layers(
            model, [{"input_ids": ids, "attention_mask": ones, "token_mask": mask}], tokens_per_sequence=limit
        )
        for mask, limit in ((masks[1], None), (masks[0], 4))
    )
    assert found == expected
    assert (found.tokens, found.sequences) == (6, 2)


def test_padding_never_counts():
    model = build_tiny_model()
    batch = next(iter(batches([(3, 12)])))
    careless = {**batch, "token_mask": torch.ones_like(batch["token_mask"])}
    assert profile_layers(model, [careless]).tokens == int(batch["attention_mask"].sum())


def test_bf16_model_has_fp32_entropies():
    model = build_tiny_model("llama").bfloat16()
    entropy, _, _, _ = naive_profile(model, batches())
    profile = profile_layers(model, batches())
    assert profile.entropy == pytest.approx(entropy.mean(1).tolist(), rel=1e-5)


def test_zero_probability_has_no_entropy_rather_than_nan():
    model = build_tiny_model("gpt_neox")
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(32, VOCABULARY)
        model.lm_head.weight.mul_(0)
        model.lm_head.bias.fill_(-torch.inf)
        model.lm_head.bias[:2] = 0.0
    assert profile_layers(model, batches()).entropy == pytest.approx([math.log(2)] * (NUM_LAYERS + 1))


@pytest.mark.parametrize("length", [VOCABULARY - 40, VOCABULARY + 40])
def test_english_tokens_of_another_length_than_the_vocabulary(length):
    model = build_tiny_model()
    english = torch.arange(length) % 3 == 0
    fitted = torch.zeros(VOCABULARY, dtype=torch.bool)
    fitted[: min(length, VOCABULARY)] = english[:VOCABULARY]
    expected = profile_layers(model, batches(), english_tokens=fitted)
    assert profile_layers(model, batches(), english_tokens=english) == expected


def test_every_module_gets_its_own_mode_back_and_no_gradient_is_kept():
    model = build_tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    quiet = profile_layers(model, batches())
    model.train()
    frozen = find_architecture(model).blocks[1]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    assert profile_layers(model, batches()) == quiet  # no dropout inside
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_and_modes_are_restored_after_an_exception():
    model = build_tiny_model().train()

    def broken():
        yield from batches()
        yield {**next(iter(batches())), "input_ids": torch.full((3, 9), VOCABULARY)}

    with pytest.raises(IndexError):
        profile_layers(model, broken())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_progress_counts_sequences():
    done = []
    profile_layers(build_tiny_model(), batches([(3, 9), (2, 7), (4, 6)]), progress=done.append)
    assert done == [3, 5, 9]


@pytest.mark.parametrize("empty", [True, False])
def test_nothing_to_measure_is_a_clear_error(empty):
    data = [] if empty else [{**batch, "token_mask": batch["token_mask"] & False} for batch in batches()]
    with pytest.raises(UsageError, match="no token to measure"):
        profile_layers(build_tiny_model(), data)


def test_wrapped_model_gives_the_same_profile():
    peft = pytest.importorskip("peft")
    model = build_tiny_model()
    expected = profile_layers(model, batches())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert profile_layers(wrapped, batches()).entropy == pytest.approx(expected.entropy, rel=1e-6)


class ToyLens:
    """Doubles the states of a layer and adds its number; remembers the calls."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def __call__(self, hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
        self.layers.append(layer)
        return 2 * hidden_states + layer


def test_a_lens_transforms_raw_states_below_the_output():
    model, lens = build_tiny_model(), ToyLens()
    profile = profile_layers(model, batches(), lens=lens)
    assert lens.layers == 2 * list(range(NUM_LAYERS))
    architecture = find_architecture(model)
    entropy = []
    for batch in batches():
        with torch.no_grad(), tap(architecture, range(NUM_LAYERS + 1)) as taps:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        counted = batch["token_mask"] & batch["attention_mask"].bool()
        states = torch.stack([taps.hidden_states[layer][counted] for layer in range(NUM_LAYERS + 1)])
        states[:-1] = 2 * states[:-1] + torch.arange(NUM_LAYERS)[:, None, None]
        p = lens_logits(architecture, states).double().softmax(-1)
        entropy.append(torch.special.entr(p).sum(-1))
    expected = torch.cat(entropy, dim=1).mean(1)
    plain = profile_layers(model, batches())
    assert profile.entropy == pytest.approx(expected.tolist(), rel=2e-6)
    assert (profile.entropy[-1], profile.agreement[-1]) == (plain.entropy[-1], 1.0)
    assert all(abs(one - other) > 1e-3 for one, other in zip(profile.entropy[1:-1], plain.entropy[1:-1], strict=True))


def test_the_identity_is_the_logit_lens():
    model = build_tiny_model()
    assert profile_layers(model, batches(), lens=lambda states, layer: states) == profile_layers(model, batches())
