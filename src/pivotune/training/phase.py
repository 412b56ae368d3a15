"""Optimizer steps of the inner losses and of L_TFT: `supervision.phase` trains the first of them in the first steps,
`supervision.alternate` in every other one."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerState

from pivotune.config.supervision import SupervisionConfig
from pivotune.errors import UsageError
from pivotune.objectives.base import schedule_factor


class Phase(TrainerCallback):
    """Weights of the loss terms at a step, and the optimizer's part of a phase.

    Everything depends on the number of the step alone, so that a resumed run goes on exactly. Without a phase this only
    applies the schedule, and need not be a callback.

    Args:
        supervision: of the run; without inner losses it has no phase.
    """

    def __init__(self, supervision: SupervisionConfig) -> None:
        self._supervision, self._phase = supervision, supervision.phase
        self._scheduled: list[float] = []

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor on the weights of the inner losses: the schedule over the phase or the run; 0 after a phase."""
        if self._phase.steps and step >= self._phase.steps:
            return 0.0
        if self._supervision.alternate and step % 2:
            return 0.0
        return schedule_factor(self._supervision.schedule, step, self._phase.steps or num_steps)

    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """Return the weight of every loss term at a step, counted from 0."""
        factor = self.factor(step, num_steps)
        inner = {name: term.weight * factor for name, term in self._supervision.active().items()}
        return {"tft": 0.0 if self._is_alone(step) else 1.0, **inner, "english_kl": self._supervision.keep_english.kl}

    def learning_rate(self, step: int) -> float | None:
        """Return the phase's own learning rate at a step; None where the scheduled one counts."""
        return self._phase.learning_rate if step < self._phase.steps else None

    def _is_alone(self, step: int) -> bool:
        if self._supervision.alternate:
            return step % 2 == 0
        return step < self._phase.steps and not self._phase.task

    # ---- events ----

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        check_phase(self._supervision, state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        rate = self.learning_rate(state.global_step)
        if rate is not None:
            self._scheduled = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = rate

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Drop gradients of zeros while L_TFT does not train.

        Its weight is 0 and not its graph missing: DDP waits for every gradient, and a batch of replayed rows has no inner
        loss. But weights above the layers are to stay as they are, and an optimizer that has seen zeros for many steps has
        second moments near 0, which multiply its first steps after the phase.
        """
        if self._is_alone(state.global_step):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    largest = parameter.grad.abs().amax()
                    # A shard's gradient is 0 only where those of all ranks are.
                    if not getattr(largest, "full_tensor", lambda largest=largest: largest)():
                        parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = rate
        self._scheduled = []


def check_phase(supervision: SupervisionConfig, num_steps: int) -> None:
    """Refuse a phase that a run of `num_steps` optimizer steps never leaves.

    Raises:
        UsageError: names the setting and the number of steps.
    """
    if supervision.phase.steps and supervision.phase.steps >= num_steps:
        raise UsageError(
            f"supervision.phase.steps: {supervision.phase.steps} is not below the run's {num_steps} optimizer steps; no "
            "step would be left to train L_TFT"
        )
