"""`DeepSupervisionTrainer`: a `transformers.Trainer` whose loss is L_TFT + w_LC * L_LC + w_ET * L_ET."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from pivotune.config.supervision import NO_SUPERVISION
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.templates import load_template
from pivotune.errors import UsageError
from pivotune.forward.passes import choose_passes
from pivotune.layers.layers_json import LayerAnalysis
from pivotune.lenses.tuned import TunedLens
from pivotune.models.adapters import add_adapters, merge_adapters
from pivotune.models.architecture import find_architecture
from pivotune.models.loading import check_vocabulary, load_model, load_tokenizer, read_config
from pivotune.models.sharding import is_fsdp
from pivotune.objectives.base import weighted_total
from pivotune.objectives.deep_supervision import DeepSupervisionLoss
from pivotune.training.arguments import DeepSupervisionConfig, optimizer_name
from pivotune.training.averaging import Interpolation, WeightAverage
from pivotune.training.batching import eval_loader, train_loader
from pivotune.training.distributed import ranks
from pivotune.training.distributed.strategies import check_head, check_sharding, prepare_fsdp, use_one_device
from pivotune.training.gradient_balance import GradientBalance
from pivotune.training.layer_choice import choose_supervision
from pivotune.training.lens_fitting import LensRefit, build_lens
from pivotune.training.metrics import LogWindow
from pivotune.training.phase import Phase
from pivotune.training.preparation import (
    adopt_template,
    build_heldout_datasets,
    build_train_dataset,
    check_evaluation,
    encode_dataset,
    freeze_unused_parameters,
    pad_token_of,
)
from pivotune.training.progress import Progress, silent, tqdm_bar
from pivotune.training.resilience.fault_tolerant import FaultTolerantTrainer
from pivotune.training.resilience.preemption import StopSignals
from pivotune.training.stand_in import check_setup
from pivotune.training.starting_model import with_starting_model

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
            negative log-likelihood of the answer per token, in nats) and `..._nll_per_character`. Where rows name several
            target languages (`language`), each of them too: `eval_vi_nll`.
        processing_class: the tokenizer; loaded by the model's name if absent.
        peft_config: a `peft` configuration to train adapters in place of the whole model.
        layers: a finished layer analysis; if absent, an `auto` layer is measured on the training rows.
        callbacks, optimizers: as in `Trainer`.
        load_start: reads the starting model again, for `interpolate`; None reads it by its name.
        progress: shows long preparations; a tqdm bar if absent.
        stop_signals, verified_checkpoint: see `FaultTolerantTrainer`.

    Attributes:
        layers: the layer analysis, or None if every layer was named.
        supervision: the inner losses with their layers.

    Raises:
        UsageError: settings, rows, layers, template or adapters that cannot be used; one line each.
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
        load_start: Callable[[], nn.Module] | None = None,
        progress: Progress | None = None,
        stop_signals: StopSignals | None = None,
        verified_checkpoint: Path | None = None,
    ) -> None:
        args = args or DeepSupervisionConfig(output_dir="trainer_output")
        processing_class = processing_class or load_tokenizer(
            model if isinstance(model, str) else model.config._name_or_path
        )
        quantized = getattr(model, "quantization_method", None) is not None
        if args.device.type != "cpu":
            # `prepare_run` refuses FSDP2 on a CPU; a process that has set up gloo itself may shard there.
            check_sharding(args, quantized=quantized, optimizer=optimizer_name(args))
        if optimizers == (None, None):
            check_setup(args, read_config(model) if isinstance(model, str) else model.config)
        # Seed before the adapters draw their first weights; `Trainer` seeds too late.
        set_seed(args.seed)
        if isinstance(model, str):
            load_start = load_start or partial(_load_whole, model, adapters=peft_config is not None)
            model = _load_whole(model, adapters=peft_config is not None)
        if isinstance(processing_class, PreTrainedTokenizerBase):
            check_vocabulary("processing_class", processing_class, model.config)
        pairs = encode_dataset(train_dataset, args, processing_class, model.config)
        heldout = build_heldout_datasets(eval_dataset, args, processing_class, model.config)
        check_evaluation(args, heldout or {}, "eval_dataset gives none")
        progress = progress or (silent if args.disable_tqdm else tqdm_bar)
        self.supervision, self.layers = choose_supervision(args, model, processing_class, pairs, layers, progress)
        if isinstance(processing_class, PreTrainedTokenizerBase):
            adopt_template(model, processing_class, load_template(args.data.template, processing_class))
        use_one_device(args)
        rows, pad_token_id = build_train_dataset(pairs, args, model.config), pad_token_of(processing_class)
        # Before adapters are added and a checkpoint is loaded. A tuned lens is of the starting model too.
        rows = with_starting_model(rows, model, self.supervision, args, pad_token_id=pad_token_id, progress=progress)
        lens = build_lens(model, args, self.supervision, pairs, progress)
        trained = cast(nn.Module, model if peft_config is None else add_adapters(model, peft_config))
        freeze_unused_parameters(trained)
        interpolation = None if args.interpolate == 1 else Interpolation(trained, args.interpolate, load_start)
        ranks.on_main(lambda: check_head(args, find_architecture(trained).lm_head))
        super().__init__(
            model=cast(PreTrainedModel, trained),
            args=args,
            data_collator=DeepSupervisionCollator(pad_token_id),
            train_dataset=rows,
            eval_dataset=heldout,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            stop_signals=stop_signals,
            verified_checkpoint=verified_checkpoint,
            sources=getattr(pairs, "sources", None),
        )
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, args, find_architecture(trained).blocks)
        run_passes = choose_passes(cast(nn.Module, self.model), args.supervision.logits.forward)
        self._losses = DeepSupervisionLoss(self.supervision, lens=lens, run_passes=run_passes)
        self._heldout_losses = DeepSupervisionLoss(NO_SUPERVISION, run_passes=run_passes)
        for objective, losses in self._losses.objectives:
            if not objective.additive:
                names = ", ".join(f"supervision.{loss.name}.signal" for loss in losses)
                reason = "this loss compares the rows of one micro-batch; another batch size trains differently"
                logger.warning("%s: %s", names, reason)
        self._phase = Phase(self.supervision)
        self._refit = None
        if isinstance(lens, TunedLens) and self.supervision.tuned.refit and pairs:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UsageError("supervision.tuned.refit: the weights are sharded in training; allowed here: 0")
            self._refit = LensRefit(self, lens, self.supervision.tuned, pairs)
            self.add_callback(self._refit)
        self._average = None if args.ema is None else WeightAverage(self, args.ema)
        if self._average is not None:
            self.add_callback(self._average)
        if interpolation is not None:
            # Behind the average, which it reads.
            self.add_callback(interpolation)
        if self.supervision.phase.steps or self.supervision.alternate:
            self.add_callback(self._phase)
        self._window = LogWindow(self._losses.names, args.device)
        self._heldout = torch.zeros(3, dtype=torch.float64)
        self._heldout_totals: dict[str, Tensor] = {}
        inner = {name: int(term.layer) for name, term in self.supervision.active().items()}
        self.balance = GradientBalance(self.supervision.balance, inner)
        self._check_balance()
        self.add_callback(self.balance)

    def _check_balance(self) -> None:
        """Measure no gradients where they cannot be taken one loss at a time; refuse to balance them there."""
        reentrant = dict(self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)  # type: ignore[arg-type]
        reason = (
            "weights are sharded" if self.is_fsdp_enabled or self.is_deepspeed_enabled
            else "activation checkpoints are reentrant" if self.args.gradient_checkpointing and reentrant
            else None
        )  # fmt: skip
        if reason is None:
            return
        if self.balance.config.mode == "gradient" and self.balance.layers:
            raise UsageError(f"supervision.balance: gradient cannot be measured where {reason}; allowed here: none")
        self.balance.layers = {}

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches: rows of similar length together, unless `train_sampling_strategy` differs."""
        loader = train_loader(
            cast(ExampleDataset, self.train_dataset),
            cast(DeepSupervisionCollator, self.data_collator),
            self.args,
            self.order,
            batch_size=self._train_batch_size,
            epoch=lambda: int(self.state.epoch or 0),
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches of a held-out dataset, or of the one with this name."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            datasets: Any = self.eval_dataset
            eval_dataset = datasets if eval_dataset is None else datasets[eval_dataset]
        loader = eval_loader(eval_dataset, cast(DeepSupervisionCollator, self.data_collator), self.args)
        return self.accelerator.prepare(loader)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the batches of another held-out dataset, in the order of `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    # ---- loss ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; before the first of some steps measure the gradients of its losses one by one."""
        if self.balance.due(self.state.global_step):
            batch = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                step, reduce = self.state.global_step, self._sum_over_ranks
                weights = self._phase.weights(step, self.state.max_steps)
                self.balance.measure(model, batch, self._losses, weights, step, reduce)
                self._losses.start_window()
        return super().training_step(model, inputs, num_items_in_batch)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """Return the batches of one accumulation window, and the count of every term over the window and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._losses.start_window()
        return batches, self._count_terms(batches, device) if batches else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this micro-batch's share of the loss: the sum over micro-batches and ranks is the loss of the window.

        Args:
            inputs: a batch as `DeepSupervisionCollator` makes it.
            num_items_in_batch: counts per term of the window, from `get_batch_samples`; None counts this batch alone.
        """
        balanced, scheduled = self.balance.factors, self._phase.weights(self.state.global_step, self.state.max_steps)
        weights = {name: weight * balanced.get(name, 1.0) for name, weight in scheduled.items()}
        off = frozenset(name for name, weight in weights.items() if weight == 0 and name != "tft")
        terms = self._losses.terms(model, inputs, off)
        counts = num_items_in_batch or self._count_terms([inputs], self.args.device)
        # DDP and FSDP average gradients over ranks; the counts are of all ranks together.
        loss = weighted_total(terms, weights, counts) * self.accelerator.num_processes
        if model.training:
            self._window.add(terms, inputs)
            self._step.add_terms(terms, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def compute_loss_context_manager(self) -> ExitStack:
        """Extend autocast beyond the model's forward: heads and losses are computed here."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def _count_terms(self, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        counted = [self._losses.counts(batch) for batch in batches]
        names = list(counted[0])
        totals = torch.stack([torch.stack([counts[name].to(device) for counts in counted]).sum() for name in names])
        return dict(zip(names, self._sum_over_ranks(totals), strict=True))

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; into a checkpoint also the moving average of its weights, and a lens that was fitted again."""
        super().save_model(output_dir, _internal_call)
        if self._staging is not None and self.args.should_save:
            for callback in (self._average, self._refit):
                if callback is not None:
                    callback.save(Path(cast(str, output_dir)))

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every loss term since the last log line, the schedule's factor, speed and padding."""
        ends = "train_runtime" in logs
        if not self._window.empty and ("loss" in logs or ends):
            figures = self._window.metrics(self._sum_over_ranks)
            # The last line of a training holds the counts of steps without a log line.
            logs.update({name: value for name, value in figures.items() if not ends or name.startswith("trained_")})
            if "loss" in logs and self.supervision.active():
                # The log line of step n reports the factor and the learning rate that step n used.
                step = max(self.state.global_step - 1, 0)
                logs.update(self.balance.take_figures())
                logs["supervision_factor"] = self._phase.factor(step, self.state.max_steps)
                if (rate := self._phase.learning_rate(step)) is not None:
                    logs["learning_rate"] = rate
        if "loss" in logs or ends:
            # After the last line of a run the sums belong to no later run.
            self._window.clear()
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate in both languages; `eval_dataset` may be rows in any form of the constructor except a file name.

        Raises:
            UsageError: FSDP2 has not sharded the model yet; it does so together with the optimizer.
        """
        if self.is_fsdp_enabled and not is_fsdp(cast(nn.Module, self.model_wrapped)):
            raise UsageError(
                "evaluate: FSDP2 shards the model when it is trained; train first, or evaluate in one process"
            )
        named = isinstance(eval_dataset, dict)
        if not (eval_dataset is None or isinstance(eval_dataset, (str, dict, ExampleDataset))):
            model_config = cast(PreTrainedModel, self.model).config
            eval_dataset = build_heldout_datasets(eval_dataset, self.args, self.processing_class, model_config)
        metrics = super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)
        datasets: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict) and not named and (codes := datasets.keys() - {"target", "english"}):
            # All target languages together.
            totals = sum(self._heldout_totals[f"{metric_key_prefix}_{code}"] for code in codes)
            target = _heldout_figures(cast(Tensor, totals), f"{metric_key_prefix}_target")
            self.log(target)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, target)
            metrics.update(target)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Add the negative log-likelihood of a batch's answers as sums: means of means would weigh short rows more."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            term = self._heldout_losses.terms(model, inputs)["tft"]
        sums = [term.sum, term.count, inputs["answer_characters"].sum()]
        self._heldout += torch.stack([value.double().cpu() for value in sums])
        return term.sum.detach() / term.count.clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Report the answer NLL per token and per character, in nats, over all tokens of the dataset and all ranks."""
        started = time.perf_counter()
        self._heldout.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Evaluation is no part of the training speed.
        self._window.pause(time.perf_counter() - started)
        totals = self._heldout
        if self.accelerator.num_processes > 1:
            totals = self._sum_over_ranks(totals.to(self.args.device))
        self._heldout_totals[metric_key_prefix] = totals.clone()
        assert output.metrics is not None
        output.metrics.update(_heldout_figures(totals, metric_key_prefix))
        return output


def _heldout_figures(totals: Tensor, prefix: str) -> dict[str, float]:
    nll, tokens, characters = totals.tolist()
    values = {"loss": nll / tokens, "nll": nll / tokens, "nll_per_character": nll / characters}
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _load_whole(name: str, *, adapters: bool) -> PreTrainedModel:
    """Load a starting model; full fine-tuning in bfloat16 loses small updates, adapters leave the base as it is."""
    return merge_adapters(load_model(name, dtype="auto" if adapters else "float32"))
