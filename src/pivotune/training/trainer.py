"""`DeepSupervisionTrainer`: a `transformers.Trainer` whose loss is L_TFT + w_LC * L_LC + w_ET * L_ET."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.layers.analysis import LayerAnalysis
from pivotune.model.branches import Forward, choose_passes
from pivotune.model.loading import load_model, load_tokenizer
from pivotune.objectives.deep_supervision import Supervision, deep_supervision_terms, term_counts
from pivotune.objectives.terms import weighted_total
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.batching import LengthsOnly, group_by_length, longest_first
from pivotune.training.checkpoints import staged_folder
from pivotune.training.english_features import with_features
from pivotune.training.fault_tolerant import FaultTolerantTrainer
from pivotune.training.log_window import LogWindow
from pivotune.training.lora import add_adapters, merge_adapters
from pivotune.training.preparation import (
    build_heldout_datasets,
    build_train_dataset,
    choose_supervision,
    encode_dataset,
)
from pivotune.training.progress import Progress
from pivotune.training.schedule import Schedule, schedule_factor

logger = logging.getLogger(__name__)


class DeepSupervisionTrainer(FaultTolerantTrainer):
    """Fine-tune a causal LM on target-language instruction data with English supervision of inner layers.

    Used like any `Trainer`: callbacks, `report_to`, `train(resume_from_checkpoint=True)`, accelerate. The loss terms are
    logged by name (`tft_loss`, `conversion_loss`, `thinking_loss`), with the current `supervision_factor` of the
    schedule. Every term is normalised by its own count over the whole accumulation window and all ranks.

    Args:
        model: a causal LM, or a name: Hub, folder, or `bundled:smollm2-135m-instruct`.
        args: a `DeepSupervisionConfig`.
        train_dataset: rows in any form of the data contract (a `datasets.Dataset`, a list of dicts, a file name), or
            already encoded `Pair`s.
        eval_dataset: the same, held out. Evaluated in both languages: `eval_target_nll`, `eval_english_nll` (mean
            negative log-likelihood of the answer per token, in nats) and `..._nll_per_character`.
        processing_class: the tokenizer; loaded by the model's name if absent.
        peft_config: a `peft` configuration to train adapters in place of the whole model.
        layers: a finished layer analysis; measured on the training rows if a layer is to be chosen and this is absent.
        callbacks, optimizers: as in `Trainer`.
        progress: shows long preparations; a bar as `Trainer` has it if absent.

    Attributes:
        layers: the layer analysis, or None where no layer had to be chosen.
        supervision: the inner losses with their layers.

    Raises:
        UsageError: rows, layers, template or adapters that cannot be used; one line each.
    """

    # compute_loss normalises over the whole accumulation window itself.
    loss_is_scaled_for_ga = True
    args: DeepSupervisionConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DeepSupervisionConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        layers: LayerAnalysis | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        progress: Progress | None = None,
    ) -> None:
        args = args or DeepSupervisionConfig(output_dir="trainer_output")
        processing_class = processing_class or load_tokenizer(_name_of(model))
        # Before the adapters draw their first weights, which `Trainer` does too late.
        set_seed(args.seed)
        if isinstance(model, str):
            # Full fine-tuning in bfloat16 loses small updates; adapters leave the base as it is.
            model = merge_adapters(load_model(model, dtype="float32" if peft_config is None else "auto"))
        pairs = encode_dataset(train_dataset, args, processing_class, model)
        self.supervision, self.layers = choose_supervision(args, model, processing_class, pairs, layers)
        _use_one_device(args)
        rows, pad_token_id = build_train_dataset(pairs, args, model.config), _pad_token_id(processing_class)
        # Before adapters are added and a checkpoint is loaded: of the model that training starts from.
        rows = with_features(rows, model, self.supervision, args, pad_token_id=pad_token_id, progress=progress)
        super().__init__(
            model=model if peft_config is None else add_adapters(model, peft_config),
            args=args,
            data_collator=DeepSupervisionCollator(pad_token_id),
            train_dataset=rows,
            eval_dataset=build_heldout_datasets(eval_dataset, args, processing_class, model),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._run_passes = choose_passes(cast(nn.Module, self.model), cast(Forward, args.logits_forward))
        self.supervision_weights = {"conversion": args.conversion_weight, "thinking": args.thinking_weight}
        self._window = LogWindow(("tft", *self.supervision.active()), args.device)
        self._heldout = torch.zeros(3, dtype=torch.float64)
        self._staging: Path | None = None

    # ---- batches ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Rows of similar length together, unless `train_sampling_strategy` asks for something else."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, ExampleDataset):
            return super()._get_train_sampler(train_dataset)
        if self.args.train_sampling_strategy == "group_by_length":
            return group_by_length(dataset, self.args, self._train_batch_size, lambda: int(self.state.epoch or 0))
        # Transformers measures the rows of other strategies itself, as token ids under this name.
        return super()._get_train_sampler(LengthsOnly(dataset, cast(Any, self.processing_class).model_input_names[0]))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Sums over all rows do not depend on their order: longest first, where one process has all of them."""
        if isinstance(eval_dataset, ExampleDataset) and self.args.world_size == 1:
            return longest_first(eval_dataset)
        return None if isinstance(eval_dataset, ExampleDataset) else super()._get_eval_sampler(eval_dataset)

    # ---- loss ----

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """The batches of one accumulation window, and the count of every term over the window and all ranks."""
        self._tell("loading data")
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin_step()
        return batches, self._count_terms(batches, device) if batches else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the window's loss; its sum over micro-batches and ranks is the loss.

        Args:
            inputs: a batch as `DeepSupervisionCollator` makes it.
            num_items_in_batch: counts per term of the window, from `get_batch_samples`; None counts this batch alone.
        """
        factor = schedule_factor(
            cast(Schedule, self.args.supervision_schedule), self.state.global_step, self.state.max_steps
        )
        weights = {"tft": 1.0, **{name: weight * factor for name, weight in self.supervision_weights.items()}}
        off = frozenset(name for name, weight in weights.items() if weight == 0)
        terms = deep_supervision_terms(model, inputs, self.supervision, skip=off, run_passes=self._run_passes)
        counts = num_items_in_batch or self._count_terms([inputs], self.args.device)
        # DDP and FSDP average gradients over ranks; the counts are of all ranks together.
        loss = weighted_total(terms, weights, counts) * self.accelerator.num_processes
        if model.training:
            self._window.add(terms, inputs)
            self._step.add_terms(terms, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast also outside the model's forward: heads and losses are computed here."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def _count_terms(self, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        counted = [term_counts(batch, self.supervision) for batch in batches]
        names = list(counted[0])
        totals = torch.stack([torch.stack([counts[name].to(device) for counts in counted]).sum() for name in names])
        return dict(zip(names, self._sum_over_ranks(totals), strict=True))

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every loss term since the last log line, the schedule's factor, speed and padding."""
        if not self._window.empty and "loss" in logs:
            logs.update(self._window.metrics(self._sum_over_ranks))
            if self.supervision.active():
                # The log line of step n reports the factor that step n used.
                step = max(self.state.global_step - 1, 0)
                logs["supervision_factor"] = schedule_factor(
                    cast(Schedule, self.args.supervision_schedule), step, self.state.max_steps
                )
        if "loss" in logs or "train_runtime" in logs:
            # The last line of a training run: what was counted since the one before belongs to no later run.
            self._window.clear()
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate in both languages; `eval_dataset` may be rows in any form that the constructor takes but a file name."""
        if not (eval_dataset is None or isinstance(eval_dataset, (str, dict, ExampleDataset))):
            model = cast(nn.Module, self.model)
            eval_dataset = build_heldout_datasets(eval_dataset, self.args, self.processing_class, model)
        return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Negative log-likelihood of a batch's answers, kept as sums: means of means would weigh short rows more."""
        self._leave_evaluation_if_stopped()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            term = deep_supervision_terms(model, inputs, Supervision(), run_passes=self._run_passes)["tft"]
        sums = [term.sum, term.count, inputs["answer_characters"].sum()]
        self._heldout += torch.stack([value.double().cpu() for value in sums])
        return term.sum.detach() / term.count.clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Answer NLL per token and per character, in nats, over all tokens of the dataset and all ranks."""
        started = time.perf_counter()
        self._heldout.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Evaluation is no part of the training speed.
        self._window.pause(time.perf_counter() - started)
        totals = self._heldout
        if self.accelerator.num_processes > 1:
            totals = self._sum_over_ranks(totals.to(self.args.device))
        nll, tokens, characters = totals.tolist()
        values = {"loss": nll / tokens, "nll": nll / tokens, "nll_per_character": nll / characters}
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and rename it when it is complete."""
        if self.args.world_size > 1:
            with self._counters_in_state():
                super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if not folder.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder.parent))
        best = self._best_checkpoint(folder)
        with staged_folder(folder) as staging, self._counters_in_state():
            self._staging = staging.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint != best:
                # `Trainer` has looked beside the staged folder.
                self.state.best_model_checkpoint = best
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        rotate_checkpoints(
            output_dir=str(folder.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            # By step: a deletion that was cut short makes an old checkpoint look new.
            use_mtime=False,
        )

    def _best_checkpoint(self, saving: Path) -> str | None:
        best = saving.parent / f"checkpoint-{self.state.best_global_step}"
        return str(best) if best == saving or best.is_dir() else self.state.best_model_checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)


def _use_one_device(args: DeepSupervisionConfig) -> None:
    """One process drives one GPU: the replicas of `DataParallel` know nothing of the taps."""
    if args.n_gpu > 1:
        logger.warning("one of %d GPUs is used; start with torchrun or accelerate launch to use all", args.n_gpu)
        args._n_gpu = 1


def _pad_token_id(tokenizer: Any) -> int:
    """Masks say what is padding, so any token will do where the tokenizer has none for it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _name_of(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else model.config._name_or_path
