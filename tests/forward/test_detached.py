"""Branches with detached weights, and branches through the upper layers, against a frozen copy of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tiny_model
from tiny_batches import gradients, make_batch, make_examples, relative_difference
from transformers import DynamicCache

from pivotune.forward.passes import PassRequest, separate_passes, shared_passes
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap, truncated

LAYER = 2
BRANCHES = {"conversion": (LAYER, "query")}


def prompt_and_english(example) -> tuple[torch.Tensor, torch.Tensor]:
    main, english = example.main, example.parallel
    parts = main.ids[: main.answer], english.ids[slice(*english.query)]
    return tuple(torch.tensor(part[None].astype("int64")) for part in parts)


def states_of(model, layer: int, **inputs):
    architecture = find_architecture(model)
    with truncated(architecture, layer), tap(architecture, [layer]) as taps:
        model(**inputs)
    return taps.hidden_states[layer]


def some_loss(states: torch.Tensor) -> torch.Tensor:
    """A value whose gradient differs at every place."""
    weights = torch.linspace(-1, 1, states.numel()).view_as(states)
    return (weights * states).sum()


def with_parallel():
    return [example for example in make_examples(4) if example.parallel is not None]


@pytest.mark.parametrize("run_passes", [separate_passes, shared_passes])
def test_only_the_prompt_trains(distinct_family, run_passes):
    """A frozen copy continues from the prompt's cache: gradient reaches the weights through keys and values alone."""
    model = build_tiny_model(distinct_family)
    frozen = copy.deepcopy(model).requires_grad_(False)
    states = []
    for prompt, english in map(prompt_and_english, with_parallel()):
        cache = DynamicCache()
        states.append(states_of(model, LAYER, input_ids=prompt, past_key_values=cache, use_cache=True)[0, -1:])
        if english.shape[1] > 1:
            states.append(states_of(frozen, LAYER, input_ids=english[:, :-1], past_key_values=cache, use_cache=True)[0])
    expected = gradients(model, some_loss(torch.cat(states)))
    request = PassRequest(branches=BRANCHES, detached_branches=True)
    found = gradients(model, some_loss(run_passes(model, make_batch(4), request).branches["conversion"].hidden_states))
    assert relative_difference({name: found[name] for name in expected}, expected) < 1e-5
    assert all(not gradient.any() for name, gradient in found.items() if name not in expected)


@pytest.mark.parametrize("run_passes", [separate_passes, shared_passes])
@pytest.mark.parametrize("detached", [False, True])
def test_a_branch_to_the_top_trains_nothing_above_its_layer(distinct_family, run_passes, detached):
    model = build_tiny_model(distinct_family)
    frozen = copy.deepcopy(model).requires_grad_(False)
    above = find_architecture(frozen)
    states = []
    for prompt, english in map(prompt_and_english, with_parallel()):
        row, start = torch.cat([prompt, english], dim=1), prompt.shape[1]
        inner = states_of(model, LAYER, input_ids=row, use_cache=False)
        if detached:
            cache = DynamicCache()
            read = states_of(model, LAYER, input_ids=prompt, past_key_values=cache, use_cache=True)
            others = states_of(frozen, LAYER, input_ids=english, past_key_values=cache, use_cache=True)
            inner = torch.cat([read, others], dim=1)
        inner = torch.cat([inner[:, : start - 1].detach(), inner[:, start - 1 :]], dim=1)

        def replace(module, args, kwargs, inner=inner):
            return ((inner, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inner})

        handle = above.blocks[LAYER].register_forward_pre_hook(replace, with_kwargs=True)
        with tap(above, [above.num_layers]) as taps:
            frozen(input_ids=row, use_cache=False)
        handle.remove()
        states.append(taps.hidden_states[above.num_layers][0, start - 1 : -1])
    expected = gradients(model, some_loss(torch.cat(states)))
    request = PassRequest(branches=BRANCHES, branches_to_top=True, detached_branches=detached)
    found = gradients(model, some_loss(run_passes(model, make_batch(4), request).branches["conversion"].hidden_states))
    assert relative_difference({name: found[name] for name in expected}, expected) < 1e-5
    assert all(not gradient.any() for name, gradient in found.items() if name not in expected)
