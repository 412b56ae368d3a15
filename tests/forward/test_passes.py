from __future__ import annotations

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model
from tiny_batches import hook_count, make_batch, make_examples, unpadded

from pivotune.forward.passes import PassRequest, branch_inputs, separate_passes
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

# Two branches at different layers, and layers of both feature losses.
REQUEST = PassRequest(
    main_layers=frozenset({1, 3}),
    branches={"conversion": (1, "query"), "thinking": (3, "answer")},
    english_layers=frozenset({1, NUM_LAYERS}),
)


def naive_branch(example, side: str) -> tuple[list[int], list[bool]]:
    """The prompt's tokens and then the English ones, from the example itself."""
    main, english = example.main, example.parallel
    part = english.ids[slice(*english.query)] if side == "query" else english.ids[english.answer :]
    prompt = main.ids[: main.answer].tolist()
    return prompt + part.tolist(), [False] * len(prompt) + [True] * len(part)


@pytest.mark.parametrize("side", ["query", "answer"])
@pytest.mark.parametrize("replay", [True, False])
def test_branch_inputs_lay_english_tokens_behind_the_prompt(side, replay):
    examples = make_examples(8, replay=replay)
    input_ids, attention_mask, branch_mask = branch_inputs(make_batch(8, replay=replay), side)
    expected = [naive_branch(example, side) for example in examples if example.parallel is not None]
    assert (
        input_ids.shape
        == attention_mask.shape
        == branch_mask.shape
        == (len(expected), max(len(e[0]) for e in expected))
    )
    for row, (tokens, is_branch) in enumerate(expected):
        padding = input_ids.shape[1] - len(tokens)
        assert input_ids[row, : len(tokens)].tolist() == tokens
        assert attention_mask[row].tolist() == [1] * len(tokens) + [0] * padding
        assert branch_mask[row].tolist() == is_branch + [False] * padding


def test_token_0_in_an_answer_is_no_prompt():
    """Many vocabularies put a real token or the padding token, which may also end texts, at id 0."""
    batch = make_batch(2)
    expected = branch_inputs(batch, "query")
    labels = torch.where(batch["labels"] >= 0, 0, batch["labels"])
    found = branch_inputs({**batch, "labels": labels}, "query")
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def states_of(model, input_ids: torch.Tensor, layer: int) -> torch.Tensor:
    """`h_layer` of one unpadded row, from a pass of the whole model."""
    architecture = find_architecture(model)
    with torch.no_grad(), tap(architecture, [layer]) as taps:
        model(input_ids=input_ids, use_cache=False)
    return taps.hidden_states[layer][0]


def assert_equal_states(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_branch_states_equal_full_passes_of_single_rows(distinct_family):
    model = build_tiny_model(distinct_family)
    passes = separate_passes(model, make_batch(4), REQUEST)
    for name, (layer, side) in REQUEST.branches.items():
        states, labels = [], []
        for example in make_examples(4):
            if example.parallel is None:
                continue
            tokens, is_branch = naive_branch(example, side)
            first = is_branch.index(True)
            states.append(states_of(model, torch.tensor([tokens]), layer)[first - 1 : -1])
            labels += tokens[first:]
        assert passes.branches[name].labels.tolist() == labels
        assert_equal_states(passes.branches[name].hidden_states, torch.cat(states))


def test_main_and_english_states_equal_full_passes_of_single_rows(distinct_family):
    model = build_tiny_model(distinct_family)
    batch = make_batch(4)
    passes = separate_passes(model, batch, REQUEST)
    assert set(passes.main.hidden_states) == {1, 3}
    assert set(passes.english.hidden_states) == {1, NUM_LAYERS}
    for row, example in enumerate(make_examples(4)):
        for layer, states in passes.main.hidden_states.items():
            ids = unpadded(batch["input_ids"][row], batch["attention_mask"][row])
            assert_equal_states(states[row, : ids.shape[1]], states_of(model, ids, layer))
        if example.parallel is not None:
            for layer, states in passes.english.hidden_states.items():
                ids = unpadded(batch["english_input_ids"][row], batch["english_attention_mask"][row])
                assert_equal_states(states[row, : ids.shape[1]], states_of(model, ids, layer))
    assert all(states.isfinite().all() for states in passes.english.hidden_states.values())


def test_final_states_are_the_normed_top(distinct_family):
    """Of the main pass always, of the English pass where the top layer is asked for."""
    model = build_tiny_model(distinct_family)
    batch = make_batch(2)
    passes = separate_passes(model, batch, REQUEST)
    with torch.no_grad():
        main = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    assert_equal_states(passes.main.final, main.hidden_states[-1])
    norm = find_architecture(model).final_norm
    assert_equal_states(passes.english.final, norm(passes.english.hidden_states[NUM_LAYERS]))


def test_model_is_as_before(distinct_family):
    model = build_tiny_model(distinct_family)
    before = hook_count(model)
    blocks = find_architecture(model).blocks
    separate_passes(model, make_batch(4), REQUEST)
    assert hook_count(model) == before
    assert find_architecture(model).blocks is blocks
    assert len(blocks) == NUM_LAYERS


def test_checkpointing_stays_switched_on():
    """It is off only during a pass without gradient, also if that pass fails."""
    model = build_tiny_model().train()
    # transformers renamed the method; the old name warns from 5.2x on and goes with v6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    blocks = find_architecture(model).blocks
    separate_passes(model, make_batch(4), REQUEST)
    assert all(block.gradient_checkpointing for block in blocks)
    broken = {**make_batch(4), "english_input_ids": torch.full((4, 1), -7)}
    with pytest.raises(IndexError):
        separate_passes(model, broken, PassRequest(english_layers=frozenset({1})))
    assert all(block.gradient_checkpointing for block in blocks)


def count_block_calls(model, request: PassRequest, **options) -> list[int]:
    calls = [0] * NUM_LAYERS

    def counter(index: int):
        def hook(module, args, output) -> None:
            calls[index] += 1

        return hook

    handles = [b.register_forward_hook(counter(i)) for i, b in enumerate(find_architecture(model).blocks)]
    separate_passes(model, make_batch(4, **options), request)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (PassRequest(), [1, 1, 1, 1]),
        (PassRequest(main_layers=frozenset({1})), [1, 1, 1, 1]),
        (PassRequest(english_layers=frozenset({2})), [2, 2, 1, 1]),
        (PassRequest(english_layers=frozenset({1, 3})), [2, 2, 2, 1]),
        (PassRequest(english_layers=frozenset({4})), [2, 2, 2, 2]),
        (PassRequest(branches={"conversion": (1, "query")}), [2, 1, 1, 1]),
        (PassRequest(branches={"conversion": (1, "query"), "thinking": (3, "answer")}), [3, 2, 2, 1]),
    ],
)
def test_passes_stop_after_the_layer_they_are_for(request_, expected):
    assert count_block_calls(build_tiny_model(), request_) == expected


def test_batch_without_english_runs_the_main_pass_only():
    model = build_tiny_model()
    assert count_block_calls(model, REQUEST, parallel=False) == [1, 1, 1, 1]
    passes = separate_passes(model, make_batch(4, parallel=False), REQUEST)
    assert passes.branches == {}
    assert passes.english is None


def with_gradient(request: PassRequest, **changes) -> PassRequest:
    return PassRequest(
        main_layers=request.main_layers, branches=request.branches, english_layers=request.english_layers, **changes
    )


def test_english_states_have_a_gradient_only_when_joint():
    model, reference = build_tiny_model(), build_tiny_model(seed=1)
    batch = make_batch(4)
    for changes, expected in (
        ({}, False),
        ({"english_gradient": True}, True),
        ({"english_gradient": True, "reference": reference}, False),
    ):
        passes = separate_passes(model, batch, with_gradient(REQUEST, **changes))
        assert passes.english.final.requires_grad is expected
        assert all(states.requires_grad is expected for states in passes.english.hidden_states.values())
        # The others always have one.
        assert passes.main.final.requires_grad
        assert all(branch.hidden_states.requires_grad for branch in passes.branches.values())


def test_reference_model_runs_the_english_pass_only():
    model, reference = build_tiny_model(), build_tiny_model(seed=1)
    batch = make_batch(4)
    own = separate_passes(model, batch, REQUEST)
    its = separate_passes(reference, batch, REQUEST)
    mixed = separate_passes(model, batch, with_gradient(REQUEST, reference=reference))
    for layer in REQUEST.english_layers:
        torch.testing.assert_close(mixed.english.hidden_states[layer], its.english.hidden_states[layer])
        assert (mixed.english.hidden_states[layer] - own.english.hidden_states[layer]).abs().max() > 0.1
    torch.testing.assert_close(mixed.main.final, own.main.final)
    torch.testing.assert_close(mixed.branches["thinking"].hidden_states, own.branches["thinking"].hidden_states)
