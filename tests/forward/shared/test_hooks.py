"""The shared forward against separate passes: same states, same gradients, no row reads another."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model, tiny_config
from tiny_batches import (
    attention_implementations,
    gradients,
    hook_count,
    make_batch,
    make_examples,
    random_batch,
    relative_difference,
    signal,
    supervise,
    values,
)
from torch import Tensor, nn

from pivotune.config.supervision import LogitsConfig, SupervisionConfig
from pivotune.errors import UsageError
from pivotune.forward import passes as branches
from pivotune.forward.passes import (
    PassRequest,
    check_shared_passes,
    choose_passes,
    separate_passes,
    shared_passes,
)
from pivotune.models.architecture import ARCHITECTURES, ArchitectureSpec, find_architecture
from pivotune.objectives.base import weighted_total
from pivotune.objectives.deep_supervision import deep_supervision_terms, term_counts

REQUEST = PassRequest(main_layers=frozenset({0, 2}), branches={"conversion": (1, "query"), "thinking": (3, "answer")})


def logits(conversion: int, thinking: int) -> SupervisionConfig:
    return supervise(conversion=signal(kind="logits", layer=conversion), thinking=signal(kind="logits", layer=thinking))


SUPERVISIONS = [
    logits(1, 3),
    logits(3, 2),  # the branch that lies first leaves first or last
    logits(NUM_LAYERS, NUM_LAYERS),
    supervise(conversion=signal(kind="feature", layer=1), thinking=signal(kind="logits", layer=2), english="joint"),
    supervise(conversion=signal(kind="logits", layer=2)),
    supervise(conversion=signal(kind="logits", layer=1), thinking=signal(kind="feature", layer=3)),
]


def terms_and_gradients(model, batch, supervision, weights, run_passes):
    terms = deep_supervision_terms(model, batch, supervision, run_passes=run_passes)
    loss = weighted_total(terms, weights, term_counts(batch, supervision))
    return values(terms), gradients(model, loss)


def checkpointed(model: nn.Module, use_reentrant: bool | None) -> nn.Module:
    if use_reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
    return model


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_terms_and_all_gradients_equal_those_of_separate_passes(family, use_reentrant):
    """Over random lengths, padding, weights and layers, in float32."""
    model = checkpointed(build_tiny_model(family).train(), use_reentrant)
    kept = hook_count(model), attention_implementations(model)
    for seed, supervision in enumerate(SUPERVISIONS):
        batch = random_batch(seed)
        weights = dict(zip(("tft", "conversion", "thinking"), torch.rand(3).tolist(), strict=True))
        expected, expected_gradients = terms_and_gradients(model, batch, supervision, weights, separate_passes)
        found, found_gradients = terms_and_gradients(model, batch, supervision, weights, shared_passes)
        assert (hook_count(model), attention_implementations(model)) == kept
        assert found.keys() == expected.keys()
        for name, (loss, count) in expected.items():
            assert found[name] == (pytest.approx(loss, rel=1e-5), count)
        assert relative_difference(found_gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("lens", ["logit", "model"])
def test_branches_with_detached_weights_equal_those_of_separate_passes(distinct_family, use_reentrant, lens):
    """The reference computes every module twice and picks by token; the shared forward never makes the products."""
    model = checkpointed(build_tiny_model(distinct_family).train(), use_reentrant)
    kept = hook_count(model), [name for name, module in model.named_modules() if "forward" in vars(module)]
    for seed, layers in enumerate([(1, 3), (3, 2)]):
        supervision = logits(*layers).model_copy(update={"logits": LogitsConfig(gradient="prompt"), "lens": lens})
        batch = random_batch(seed)
        weights = dict(zip(("tft", "conversion", "thinking"), torch.rand(3).tolist(), strict=True))
        expected, expected_gradients = terms_and_gradients(model, batch, supervision, weights, separate_passes)
        found, found_gradients = terms_and_gradients(model, batch, supervision, weights, shared_passes)
        assert (hook_count(model), [n for n, module in model.named_modules() if "forward" in vars(module)]) == kept
        for name, (loss, count) in expected.items():
            assert found[name] == (pytest.approx(loss, rel=1e-5), count)
        assert relative_difference(found_gradients, expected_gradients) < 1e-5


def test_the_random_rows_hold_every_case():
    batches = [random_batch(seed) for seed in range(len(SUPERVISIONS))]
    without_english = [(~batch["english_attention_mask"].any(1)).sum().item() for batch in batches]
    single_tokens = sum((batch["english_query_mask"].sum(1) == 1).sum().item() for batch in batches)
    padding = [1 - batch["attention_mask"].float().mean().item() for batch in batches]
    assert any(without_english)
    assert single_tokens
    assert max(padding) > 0.2
    assert min(len(batch["labels"]) for batch in batches) < max(len(batch["labels"]) for batch in batches)


def test_states_equal_those_of_separate_passes(family):
    model, batch = build_tiny_model(family), make_batch(8)
    shared, separate = shared_passes(model, batch, REQUEST), separate_passes(model, batch, REQUEST)
    real = batch["attention_mask"].bool()
    pairs = [(shared.main.final, separate.main.final)]
    pairs += [(shared.main.hidden_states[k], separate.main.hidden_states[k]) for k in REQUEST.main_layers]
    for one, other in pairs:
        assert one.shape == other.shape
        torch.testing.assert_close(one[real], other[real], atol=2e-5, rtol=2e-5)
    for name in REQUEST.branches:
        assert torch.equal(shared.branches[name].labels, separate.branches[name].labels)
        torch.testing.assert_close(
            shared.branches[name].hidden_states, separate.branches[name].hidden_states, atol=2e-5, rtol=2e-5
        )


# --- tokens see their own row only ---------------------------------------------------------------------------------


def changed_states(family: str, change) -> dict[str, Tensor]:
    """How far each state moves when `change` alters the batch: by branch (predictions) and for the main rows (B, T)."""
    model, batch = build_tiny_model(family), make_batch(8, replay=False)
    altered = {name: tensor.clone() for name, tensor in batch.items()}
    change(altered)
    with torch.no_grad():
        before, after = (shared_passes(model, rows, REQUEST) for rows in (batch, altered))
    moved = {
        name: (after.branches[name].hidden_states - before.branches[name].hidden_states) for name in before.branches
    }
    moved["main"] = (after.main.final - before.main.final)[batch["attention_mask"].bool()]
    return {name: difference.abs().amax(-1) for name, difference in moved.items()}


@pytest.mark.parametrize(
    ("side", "own", "other"), [("query", "conversion", "thinking"), ("answer", "thinking", "conversion")]
)
def test_a_token_of_one_branch_changes_only_what_follows_in_that_branch(family, side, own, other):
    row = 3
    batch = make_batch(8, replay=False)
    mask = batch[f"english_{side}_mask"]
    first = int(mask[row].nonzero()[0, 0])

    def change(altered):
        altered["english_input_ids"][row, first] += 1

    moved = changed_states(family, change)
    assert not moved["main"].any()
    assert not moved[other].any()
    counts = mask.sum(1)
    start = int(counts[:row].sum())
    # The first prediction of a row is made by the prompt; the changed token makes the second.
    expected = torch.zeros(int(counts.sum()), dtype=torch.bool)
    expected[start + 1 : start + int(counts[row])] = True
    assert torch.equal(moved[own] > 0, expected)


def test_an_answer_changes_no_branch_and_a_prompt_changes_both(family):
    def answer(altered):
        altered["input_ids"][altered["labels"] >= 0] += 1

    def prompt(altered):
        altered["input_ids"][2, 0] += 1

    moved = changed_states(family, answer)
    assert moved["main"].any()
    assert not moved["conversion"].any()
    assert not moved["thinking"].any()
    moved = changed_states(family, prompt)
    batch = make_batch(8, replay=False)
    for name, side in (("conversion", "query"), ("thinking", "answer")):
        of_row = torch.arange(len(batch["labels"])).repeat_interleave(batch[f"english_{side}_mask"].sum(1))
        assert not moved[name][of_row != 2].any()
        assert moved[name][of_row == 2].any()


# --- cost ----------------------------------------------------------------------------------------------------------


def tokens_by_block(model: nn.Module, batch: dict[str, Tensor], request: PassRequest) -> list[int]:
    """How many tokens each block's feed-forward part works on, and that the model is called once."""
    calls, tokens = [], []
    handles = [model.register_forward_pre_hook(lambda module, args: calls.append(1))]
    for block in find_architecture(model).blocks:
        handles.append(
            block.mlp.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[:2].numel()))
        )
    shared_passes(model, batch, request)
    for handle in handles:
        handle.remove()
    assert len(calls) == 1
    return tokens


def test_branches_leave_after_their_layers_and_nothing_is_padded(family):
    batch = make_batch(8)
    main = int(batch["attention_mask"].sum())
    # The last token of a branch predicts nothing and is not run.
    query, answer = (int((batch[f"english_{side}_mask"].sum(1) - 1).clamp(min=0).sum()) for side in ("query", "answer"))
    tokens = tokens_by_block(build_tiny_model(family), batch, REQUEST)
    assert tokens == [main + query + answer, main + answer, main + answer, main]


def test_rows_of_almost_one_length_keep_their_padding():
    """Taking it out would cost more than it saves; with more padding it is taken out."""
    model = build_tiny_model()
    batch = {name: tensor.repeat(60, 1) for name, tensor in make_batch(1).items() if tensor.ndim == 2}
    length = batch["input_ids"].shape[1]
    for rows, expected in ((1, 60 * length), (20, 60 * length - 20)):
        batch["attention_mask"][:rows, -1] = 0
        assert tokens_by_block(model, batch, PassRequest()) == [expected] * NUM_LAYERS


# --- precision, adapters, compilation ------------------------------------------------------------------------------


def test_bfloat16_autocast_differs_no_more_than_rounding(family):
    model, batch = build_tiny_model(family), make_batch(8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        shared, separate = shared_passes(model, batch, REQUEST), separate_passes(model, batch, REQUEST)
    with torch.no_grad():
        exact = separate_passes(model, batch, REQUEST)
    for name in REQUEST.branches:
        found, reference, truth = (p.branches[name].hidden_states.float() for p in (shared, separate, exact))
        rounding = (reference - truth).norm()
        assert 0 < (found - truth).norm() < 1.5 * rounding


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_adapters_get_the_gradients_of_separate_passes(use_reentrant):
    from peft import LoraConfig, get_peft_model

    base = build_tiny_model("llama").train()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    model = checkpointed(model, use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    weights = {"tft": 1.0, "conversion": 0.5, "thinking": 0.5}
    results = [
        terms_and_gradients(model, make_batch(8), logits(1, 3), weights, run)
        for run in (separate_passes, shared_passes)
    ]
    assert len(results[0][1]) == len([p for p in model.parameters() if p.requires_grad])
    assert relative_difference(results[1][1], results[0][1]) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_gives_the_same():
    model, batch = build_tiny_model("llama", num_hidden_layers=2).train(), make_batch(8)
    weights = {"tft": 1.0, "conversion": 0.5, "thinking": 0.5}
    expected, expected_gradients = terms_and_gradients(model, batch, logits(1, 1), weights, shared_passes)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        found, found_gradients = terms_and_gradients(compiled, batch, logits(1, 1), weights, choose_passes(compiled))
        assert {name: total for name, (total, _) in found.items()} == pytest.approx(
            {name: total for name, (total, _) in expected.items()}, rel=1e-5
        )
        found_gradients = {name.removeprefix("_orig_mod."): value for name, value in found_gradients.items()}
        assert relative_difference(found_gradients, expected_gradients) < 1e-5


def test_attention_dropout_is_applied_and_drawn_anew():
    model = build_tiny_model("llama", attention_dropout=0.5).train()
    with torch.no_grad():
        one, other = (shared_passes(model, make_batch(4), PassRequest()).main.final for _ in range(2))
        model.eval()
        third, fourth = (shared_passes(model, make_batch(4), PassRequest()).main.final for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(third, fourth)


# --- which way is taken --------------------------------------------------------------------------------------------


@pytest.fixture
def plain_llama(monkeypatch):
    """Llama registered without `shared_prefix`."""
    monkeypatch.setitem(ARCHITECTURES, "llama", ArchitectureSpec())
    branches._warn_once.cache_clear()
    return build_tiny_model("llama")


def test_supported_families_share(family):
    assert choose_passes(build_tiny_model(family)) is shared_passes
    assert choose_passes(build_tiny_model(family), "shared") is shared_passes
    assert choose_passes(build_tiny_model(family), "separate") is separate_passes


def test_other_families_fall_back_and_say_so_once(plain_llama, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_passes(plain_llama) is separate_passes
        assert choose_passes(plain_llama) is separate_passes
        deep_supervision_terms(plain_llama, make_batch(2), logits(1, 2))
    (record,) = caplog.records
    assert "padded passes, one for every branch" in record.getMessage()
    assert "'llama' is registered without shared_prefix=True" in record.getMessage()
    assert choose_passes(plain_llama, "separate") is separate_passes


def test_asking_for_what_is_not_possible_is_an_error(plain_llama):
    with pytest.raises(UsageError, match=r"supervision.logits.forward: shared is not possible: model type 'llama' is"):
        choose_passes(plain_llama, "shared")


def test_models_that_cannot_share(caplog):
    spread = build_tiny_model("llama")
    spread.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta"}
    assert choose_passes(spread) is separate_passes
    both_ways = build_tiny_model("gemma3_text", use_bidirectional_attention=True)
    assert choose_passes(both_ways) is separate_passes
    assert choose_passes(build_tiny_model("gemma3_text")) is shared_passes


def test_blocks_wrapped_for_checkpointing_from_outside_share():
    """FSDP's own activation checkpointing wraps them so; the second run of a block needs the packing too."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    model, batch = build_tiny_model("llama"), make_batch()
    expected = gradients(model, states_sum(shared_passes(model, batch, REQUEST)))
    wrapped = build_tiny_model("llama")
    for index in range(len(wrapped.model.layers)):
        wrapped.model.layers[index] = checkpoint_wrapper(wrapped.model.layers[index])
    wrapped.model.layers[0] = offload_wrapper(wrapped.model.layers[0])
    assert choose_passes(wrapped) is shared_passes
    kept = [block.checkpoint_fn for block in wrapped.model.layers]
    found = gradients(wrapped, states_sum(shared_passes(wrapped, batch, REQUEST)))
    plain = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}
    assert relative_difference(plain, expected) < 1e-5
    assert [block.checkpoint_fn for block in wrapped.model.layers] == kept
    assert hook_count(wrapped) == 0


def states_sum(passes):
    """A number that every state of the passes goes into."""
    states = [*passes.main.hidden_states.values(), *(branch.hidden_states for branch in passes.branches.values())]
    return sum(state.square().sum() for state in states)


def test_check_for_a_new_family(family):
    assert check_shared_passes(build_tiny_model(family)) < 2e-5


def test_check_finds_what_cannot_share():
    """Attention to later tokens mixes the rows of a packed batch differently than separate rows."""
    model = build_tiny_model("gemma3_text", use_bidirectional_attention=True)
    assert tiny_config("gemma3_text").use_bidirectional_attention is False
    assert check_shared_passes(model) > 1e-2


def test_replay_rows_alone_have_no_branch():
    batch = make_batch(8)
    replay = {name: tensor[batch["english_answer"]] for name, tensor in batch.items()}
    assert len(replay["labels"]) == len([example for example in make_examples(8) if example.english_answer]) > 0
    passes = shared_passes(build_tiny_model(), replay, REQUEST)
    assert passes.branches == {}
    assert passes.main.final is not None


# --- input that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_passes", [shared_passes, separate_passes])
def test_a_branch_without_a_prompt_is_refused(run_passes):
    batch = make_batch(4)
    batch["labels"][1] = torch.where(batch["attention_mask"][1].bool(), batch["input_ids"][1], -100)
    with pytest.raises(ValueError, match="conversion: row 1 of the batch has an English query and no prompt"):
        run_passes(build_tiny_model(), batch, REQUEST)


@pytest.mark.parametrize("run_passes", [shared_passes, separate_passes])
@pytest.mark.parametrize("layer", [0, NUM_LAYERS + 1])
def test_a_branch_to_a_layer_that_is_not_there_is_refused(run_passes, layer):
    with pytest.raises(ValueError, match=f"thinking: layer {layer} is not in 1 to {NUM_LAYERS}"):
        run_passes(build_tiny_model(), make_batch(4), PassRequest(branches={"thinking": (layer, "answer")}))


def test_padding_on_the_left_is_refused():
    batch = {name: tensor.flip(1) for name, tensor in make_batch(4).items() if tensor.ndim == 2}
    with pytest.raises(ValueError, match="padded on the right"):
        shared_passes(build_tiny_model(), batch, PassRequest())


def test_padding_alone_gives_what_separate_passes_give():
    batch = make_batch(2)
    batch["attention_mask"].zero_()
    assert shared_passes(build_tiny_model(), batch, PassRequest()).main.final.shape[:2] == batch["labels"].shape


@pytest.mark.parametrize("limit", [8, 12, 200])
def test_rotary_embeddings_that_depend_on_the_longest_sequence(limit):
    """Some branches are longer than the main rows; they must not change the embeddings of the main rows."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    weights = {"tft": 1.0, "conversion": 0.5, "thinking": 0.5}
    results = []
    for run in (separate_passes, shared_passes):
        # A model of its own: such embeddings remember the longest sequence that they have seen.
        model = build_tiny_model("llama", max_position_embeddings=limit, rope_parameters=rope)
        results.append(terms_and_gradients(model, make_batch(8), logits(1, 3), weights, run))
    assert relative_difference(results[1][1], results[0][1]) < 1e-5


class Wrapper(nn.Module):
    """Reads attributes from the block inside, but sets them on itself, as FSDP does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inside = block

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_inside_a_wrapper(use_reentrant):
    model = checkpointed(build_tiny_model().train(), use_reentrant)
    weights = {"tft": 1.0, "conversion": 0.5, "thinking": 0.5}
    _, expected = terms_and_gradients(model, make_batch(8), logits(1, 3), weights, separate_passes)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Wrapper(block)
    _, found = terms_and_gradients(model, make_batch(8), logits(1, 3), weights, shared_passes)
    assert relative_difference({name.replace(".inside", ""): value for name, value in found.items()}, expected) < 1e-5
