"""A toy objective, lens and method: each is one class here and one line of registration in the test that trains with it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from pivotune.config.supervision import Section
from pivotune.forward.passes import PassRequest
from pivotune.methods.base import ExamplePlan
from pivotune.objectives.base import LossTerm


class PushOptions(Section):
    """Options of `Push`, under `supervision.push`."""

    power: int = 2


class Push:
    """Mean distance of all states of a micro-batch from one another: not a sum over rows."""

    additive = False
    uses_lens = True
    seen: ClassVar[list[Any]] = []

    def __init__(self, options: PushOptions) -> None:
        self.options = options

    def request(self, losses, batch, architecture, reference):
        return PassRequest(main_layers=frozenset(loss.layer for loss in losses))

    def count(self, loss, batch):
        return torch.tensor(len(batch["labels"]))

    def __call__(self, losses, passes, batch, architecture, lens):
        self.seen.append((self.options.power, [loss.name for loss in losses]))
        terms = {}
        for loss in losses:
            states = lens(passes.main.hidden_states[loss.layer], loss.layer).mean(dim=1)
            distances = (states[:, None] - states[None]).abs().pow(self.options.power).mean()
            terms[loss.name] = LossTerm(distances * len(states), self.count(loss, batch))
        return terms


class Halving:
    """A lens that halves every state."""

    layers: ClassVar[set[int]] = set()

    def __init__(self, architecture) -> None:
        pass

    def __call__(self, hidden_states, layer):
        self.layers.add(layer)
        return hidden_states / 2


class BothPrompts:
    """Every row twice: the target prompt and the English prompt, both with the English answer."""

    name = "both-prompts"
    summary = "Toy."
    main_language = "target"
    replay = False
    inner_losses = True
    needs_english = True
    pivot_marker = None

    def rewriter(self, rows: object, settings: object) -> None:
        return None

    def plan(self, replayed: np.ndarray) -> ExamplePlan:
        english_prompt = np.tile([False, True], len(replayed))
        return ExamplePlan(
            rows=np.repeat(np.arange(len(replayed)), 2),
            english_prompt=english_prompt,
            english_answer=np.ones_like(english_prompt),
            parallel=~english_prompt,
        )


BOTH_PROMPTS = BothPrompts()
