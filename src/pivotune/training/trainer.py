"""`DeepSupervisionTrainer`: a `transformers.Trainer` whose loss is L_TFT + w_LC * L_LC + w_ET * L_ET."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from pivotune.config.registry import LENSES
from pivotune.config.settings import NO_SUPERVISION, SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.errors import UsageError
from pivotune.forward.passes import choose_passes
from pivotune.layers.analysis import LayerAnalysis
from pivotune.models.adapters import add_adapters, merge_adapters
from pivotune.models.architecture import find_architecture
from pivotune.models.loading import load_model, load_tokenizer
from pivotune.models.sharding import is_fsdp
from pivotune.objectives.base import schedule_factor, weighted_total
from pivotune.objectives.deep_supervision import build_objectives, deep_supervision_terms, term_counts
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.batching import LengthsOnly, group_by_length, longest_first
from pivotune.training.distributed import ranks
from pivotune.training.distributed.rank_rows import RankOrder, WithBlankRows
from pivotune.training.distributed.shared_saving import save_together
from pivotune.training.distributed.strategies import check_head, prepare_fsdp, use_one_device
from pivotune.training.english_features import with_features
from pivotune.training.metrics import LogWindow
from pivotune.training.preparation import (
    build_heldout_datasets,
    build_train_dataset,
    choose_supervision,
    encode_dataset,
    freeze_unused_parameters,
    pad_token_of,
)
from pivotune.training.progress import Progress, silent, tqdm_bar
from pivotune.training.resilience.checkpoint_safety import check_checkpoint, own_checkpoint
from pivotune.training.resilience.checkpoints import set_newer_aside, whole_checkpoint
from pivotune.training.resilience.checksums import find_checkpoint_damage, find_damage
from pivotune.training.resilience.data_order import DataOrder, order_of, resumed_order, save_order
from pivotune.training.resilience.fault_tolerant import FaultTolerantTrainer
from pivotune.training.resilience.preemption import spare_workers

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
        verified_checkpoint: one whose checksums the caller has compared already.

    Raises:
        UsageError: rows, layers, template or adapters that cannot be used; one line each.
    """

    # compute_loss normalises over the whole accumulation window itself.
    loss_is_scaled_for_ga = True
    args: DeepSupervisionConfig
    verified_checkpoint: Path | None = None

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
        pairs = encode_dataset(train_dataset, args, processing_class, model.config)
        progress = progress or (silent if args.disable_tqdm else tqdm_bar)
        self.supervision, self.layers = choose_supervision(args, model, processing_class, pairs, layers, progress)
        use_one_device(args)
        rows, pad_token_id = build_train_dataset(pairs, args, model.config), pad_token_of(processing_class)
        # Before adapters are added and a checkpoint is loaded: of the model that training starts from.
        rows = with_features(rows, model, self.supervision, args, pad_token_id=pad_token_id, progress=progress)
        trained = cast(nn.Module, model if peft_config is None else add_adapters(model, peft_config))
        freeze_unused_parameters(trained)
        ranks.on_main(lambda: check_head(args, find_architecture(trained).lm_head))
        super().__init__(
            model=cast(PreTrainedModel, trained),
            args=args,
            data_collator=DeepSupervisionCollator(pad_token_id),
            train_dataset=rows,
            eval_dataset=build_heldout_datasets(eval_dataset, args, processing_class, model.config),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, args, find_architecture(trained).blocks)
        self.lens = LENSES[args.supervision.lens](find_architecture(trained))
        self._run_passes = choose_passes(cast(nn.Module, self.model), args.supervision.logits.forward)
        _log_non_additive(self.supervision)
        self._window = LogWindow(("tft", *self.supervision.active()), args.device)
        self._heldout = torch.zeros(3, dtype=torch.float64)
        self._staging: Path | None = None
        self._order: DataOrder | None = None

    # ---- batches ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Rows of similar length together, unless `train_sampling_strategy` asks for something else."""
        dataset = _rows(self.train_dataset if train_dataset is None else train_dataset)
        if not isinstance(dataset, ExampleDataset):
            return super()._get_train_sampler(train_dataset)
        order = self._order or order_of(self.args, self._train_batch_size)
        if self.args.train_sampling_strategy == "group_by_length":
            return self._for_ranks(group_by_length(dataset, self.args, order, self._epoch), self._train_batch_size)
        # Transformers measures the rows of other strategies itself, as token ids under this name.
        lengths = LengthsOnly(dataset, cast(Any, self.processing_class).model_input_names[0])
        return self._for_ranks(super()._get_train_sampler(lengths), self._train_batch_size)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Sums over all rows do not depend on their order: longest first."""
        dataset = _rows(eval_dataset)
        if not isinstance(dataset, ExampleDataset):
            return super()._get_eval_sampler(eval_dataset)
        return self._for_ranks(longest_first(dataset), self.args.eval_batch_size, drop_last=False)

    def _for_ranks(self, sampler: Any, batch_size: int, *, drop_last: bool | None = None) -> Any:
        """The sampler as several processes share it out; `batch_size` is that of one."""
        # A batch sampler knows of ranks itself.
        if self.args.world_size == 1 or isinstance(sampler, BatchSampler):
            return sampler
        if type(sampler) is RandomSampler:
            # As accelerate does for one process: the order depends on seed and epoch only.
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed)
        return RankOrder(
            sampler,
            batch_size=batch_size,
            world_size=self.args.world_size,
            drop_last=self.args.dataloader_drop_last if drop_last is None else drop_last,
            epoch=self._epoch,
        )

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dataset, ExampleDataset) and self.args.world_size > 1:
            dataset = WithBlankRows(dataset)
        return spare_workers(super()._get_dataloader(dataset, *args, **kwargs))

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: True goes on from the newest checkpoint that is whole, a path from that one. Newer ones
                are moved out of the way.

        Raises:
            UsageError: the checkpoint is damaged, or would run code, or its steps hold other rows than this run's.
        """
        checkpoint = ranks.on_main(lambda: self._chosen_checkpoint(resume_from_checkpoint))
        now = order_of(self.args, self._train_batch_size)
        self._order = now if checkpoint is None else ranks.on_main(lambda: resumed_order(checkpoint, now))
        if self._order != now:
            logger.warning("%s was begun with %s; this run has %s, in the same order", checkpoint, self._order, now)
        if checkpoint is not None:
            ranks.on_main(lambda: set_newer_aside(Path(str(self.args.output_dir)), checkpoint))
        return super().train(resume_from_checkpoint if checkpoint is None else str(checkpoint), **kwargs)

    def _chosen_checkpoint(self, resume_from: Any) -> Path | None:
        """What to go on from, checked before anything reads it; DeepSpeed reads states by itself."""
        if resume_from is True:
            checkpoint = whole_checkpoint(Path(str(self.args.output_dir)))
        elif isinstance(resume_from, (str, os.PathLike)):
            checkpoint = Path(resume_from)
            problem = None if checkpoint == self.verified_checkpoint else find_checkpoint_damage(checkpoint)
            if problem is not None:
                raise UsageError(f"{checkpoint} is damaged: {problem}; resume from another checkpoint")
        else:
            return None
        if checkpoint is not None:
            check_checkpoint(checkpoint)
        return checkpoint

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
        factor = schedule_factor(self.args.supervision.schedule, self.state.global_step, self.state.max_steps)
        weights = {"tft": 1.0, **{name: term.weight * factor for name, term in self.supervision.active().items()}}
        off = frozenset(name for name, weight in weights.items() if weight == 0)
        terms = deep_supervision_terms(
            model, inputs, self.supervision, skip=off, lens=self.lens, run_passes=self._run_passes
        )
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
                logs["supervision_factor"] = schedule_factor(self.args.supervision.schedule, step, self.state.max_steps)
        if "loss" in logs or "train_runtime" in logs:
            # The last line of a training run: what was counted since the one before belongs to no later run.
            self._window.clear()
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate in both languages; `eval_dataset` may be rows in any form that the constructor takes but a file name.

        Raises:
            UsageError: FSDP2 has not sharded the model yet, which it does together with its optimizer.
        """
        if self.is_fsdp_enabled and not is_fsdp(cast(nn.Module, self.model_wrapped)):
            raise UsageError(
                "evaluate: FSDP2 shards the model when it is trained; train first, or evaluate in one process"
            )
        if not (eval_dataset is None or isinstance(eval_dataset, (str, dict, ExampleDataset))):
            model_config = cast(PreTrainedModel, self.model).config
            eval_dataset = build_heldout_datasets(eval_dataset, self.args, self.processing_class, model_config)
        return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Negative log-likelihood of a batch's answers, kept as sums: means of means would weigh short rows more."""
        self._leave_evaluation_if_stopped()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            term = deep_supervision_terms(model, inputs, NO_SUPERVISION, run_passes=self._run_passes)["tft"]
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
        """Write the checkpoint beside its place and rename it when it is complete; all ranks together."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        ranks.agree(partial(_must_be_there, folder.parent))
        best = self._best_checkpoint(folder.parent, saving=folder)
        with self._counters_in_state():
            save_together(folder, partial(self._write_checkpoint, model, trial, best))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                # By step: a deletion that was cut short makes an old checkpoint look new.
                use_mtime=False,
            )

    def _write_checkpoint(self, model: nn.Module, trial: Any, best: str | None, staging: Path) -> None:
        self._staging = staging.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        # `Trainer` has looked for the best one beside the staged folder.
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            save_order(self._order or order_of(self.args, self._train_batch_size), staging)

    def _load_best_model(self) -> None:
        """Only from this run's own folder, whatever the `trainer_state.json` that it was resumed from names."""
        named = self.state.best_model_checkpoint
        best, problem = ranks.on_main(lambda: self._look_at_best(named))
        # One that cannot be used must not be what the last checkpoints are deleted in favour of.
        self.state.best_model_checkpoint = None if best is None else str(best)
        if best is None:
            logger.warning("the best checkpoint %s is %s; the last weights are kept", named, problem)
            return
        super()._load_best_model()

    def _look_at_best(self, named: str | None) -> tuple[Path | None, str]:
        """The best checkpoint where it can be loaded, and why not."""
        best = own_checkpoint(named, Path(super()._get_output_dir(None)))
        if best is None:
            return None, "not one of this run"
        problem = find_damage(best)
        if problem is not None:
            return None, f"damaged ({problem})"
        check_checkpoint(best)
        return best, ""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)


def _must_be_there(folder: Path) -> None:
    """A run folder that has vanished is not made again: what it held is gone."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))


def _log_non_additive(supervision: SupervisionConfig) -> None:
    for objective, losses in build_objectives(supervision):
        if not objective.additive:
            names = ", ".join(f"supervision.{loss.name}.signal" for loss in losses)
            logger.warning(
                "%s: this loss compares the rows of one micro-batch; another batch size trains differently", names
            )


def _rows(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, WithBlankRows) else dataset


def _name_of(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else model.config._name_or_path
