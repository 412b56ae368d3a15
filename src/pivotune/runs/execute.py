"""Execute a prepared run: load, choose layers, train, score, save."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.data.formats import row_name
from pivotune.data.pair_store import pairs_digest
from pivotune.errors import TrainingError, UsageError
from pivotune.estimate.memory_changes import explained_out_of_memory
from pivotune.layers.layers_json import LayerAnalysis, read_layers_json, write_layers_json
from pivotune.lenses.tuned import LensFigures
from pivotune.models.adapters import add_adapters, build_lora_config, merge_adapters
from pivotune.models.loading import load_model
from pivotune.runs.export import gathered_model, is_sharded, save_model
from pivotune.runs.folder import make_folder, remove_leftovers, run_lock, write_run_config
from pivotune.runs.model_card import model_card
from pivotune.runs.prepare import PreparedRun
from pivotune.runs.record import has_rows_record, read_start_scores, write_rows_record, write_start_scores
from pivotune.text.files import write_items, write_json, write_text
from pivotune.training.distributed import ranks
from pivotune.training.heldout import RowScore, score_answers, summarize
from pivotune.training.layer_choice import measure_layers
from pivotune.training.lens_fitting import LENS_FILE, read_lens_figures
from pivotune.training.metrics import FigureLog, MetricsFile, trained_totals
from pivotune.training.preparation import heldout_examples
from pivotune.training.progress import Progress, silent
from pivotune.training.resilience.checkpoints import DISK_FULL, kept, write_advice
from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals
from pivotune.training.trainer import DeepSupervisionTrainer

# Seconds until a folder made on another machine must be visible.
_SEEN_AFTER = 60.0
# From the layer analysis, and layer -> KL of the tuned and the logit lens, to PNG by name.
Draw = Callable[[LayerAnalysis | None, Mapping[int, LensFigures]], Mapping[str, bytes]]
# Held-out scores by side: `target` and `english`.
Scores = dict[str, list[RowScore]]
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?:[^.]*signal: (\w+))?")
# Messages of gloo, NCCL and torch's store about a rank that is gone or that a collective waited for in vain.
_LOST_RANK = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|was)|broken pipe|timed out waiting|remote process|recvValue|TCPStore",
    re.IGNORECASE,
)


@dataclass
class RunResult:
    """A finished run. `before` holds the starting model's held-out scores."""

    folder: Path
    layers: LayerAnalysis | None
    results: dict[str, Any]
    model: Any
    before: Scores
    log_history: list[dict[str, Any]] = field(default_factory=list)


def execute_run(
    prepared: PreparedRun,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    before: Scores | None = None,
    stop_signals: StopSignals | None = None,
    draw: Draw | None = None,
) -> RunResult:
    """Load the model, choose layers, train, score and save.

    Args:
        before: the starting model's held-out scores, if another run from the same start has measured them.
        draw: draws the layer analysis and the lens for the integrations of `report_to`.
        stop_signals: records signals that ask the run to stop.

    Raises:
        UsageError: another process trains in the folder, or it cannot be written, or the disk is full.
        TrainingError: a fault that stopped the training; the line says what is kept.
        StoppedBySignalError: a signal asked the run to stop.
    """
    folder = prepared.folder
    with ExitStack() as stack:
        ranks.on_main(lambda: make_folder(folder))
        ranks.agree(partial(_wait_for_shared, folder))
        # The main process locks the folder for all.
        ranks.agree(lambda: stack.enter_context(run_lock(folder)) if ranks.is_main() else None)
        stack.enter_context(explained_faults(folder))
        shown = progress if progress is not None and ranks.is_main() else silent
        return _execute(prepared, resume, callbacks, shown, before, stop_signals or StopSignals(), draw)


def _wait_for_shared(folder: Path) -> None:
    until = time.monotonic() + _SEEN_AFTER
    while not folder.is_dir() and time.monotonic() < until:
        # Reading the parent makes a network file system forget that the folder was not there.
        with suppress(OSError):
            os.listdir(folder.parent)
        time.sleep(0.5)
    if not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is not on a file system that all machines of the run share; choose one")


def _execute(
    prepared: PreparedRun,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
    progress: Progress,
    before: Scores | None,
    stop_signals: StopSignals,
    draw: Draw | None,
) -> RunResult:
    config, args, folder = prepared.config, prepared.args, prepared.folder
    in_memory = partial(explained_out_of_memory, config, args)

    def begin_folder() -> LayerAnalysis | None:
        """Write the first files; return the layers of a resumed run: another machine might measure others."""
        remove_leftovers(folder, resume=resume)
        write_run_config(folder, config)
        # A process that was killed before it wrote the record has trained on nothing yet.
        if not resume or not has_rows_record(folder):
            write_rows_record(folder, prepared.train, config.data)
        path = folder / "layers.json"
        return read_layers_json(path) if resume and path.is_file() else None

    layers = ranks.on_main(begin_folder)
    with in_memory("loading the model"):
        model = _load_starting_model(config)
    automatic = any(term.layer == "auto" for term in config.supervision.active().values())
    if layers is None and automatic and METHODS[config.method].inner_losses:
        with in_memory("measuring the layers"):
            layers = measure_layers(
                args, model, prepared.tokenizer, prepared.train, model_name=config.model, progress=progress
            )
    trainer = DeepSupervisionTrainer(
        model,
        args,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation or None,
        processing_class=prepared.tokenizer,
        peft_config=None if config.lora is None else build_lora_config(config.lora, model),
        layers=layers,
        load_start=partial(_load_starting_model, config),
        callbacks=[MetricsFile(folder / "metrics.jsonl"), *callbacks],
        progress=progress,
        stop_signals=stop_signals,
        verified_checkpoint=prepared.checkpoint,
    )
    # Without tqdm Transformers prints every log line; ours go to metrics.jsonl and the caller's callbacks.
    trainer.remove_callback(PrinterCallback)
    if (chosen := trainer.layers) is not None:
        ranks.on_main(lambda: write_layers_json(folder / "layers.json", chosen))
    if draw is not None:
        lens = folder / LENS_FILE
        kl = read_lens_figures(lens) if lens.is_file() else {}
        trainer.add_callback(FigureLog(trainer, partial(draw, chosen, kl)))
    with in_memory("scoring the starting model"):
        start = _StartScores(prepared, trainer, progress, before, resume=resume)
    with in_memory("training"), stop_signals.deferred():
        trainer.train(resume_from_checkpoint=None if prepared.checkpoint is None else str(prepared.checkpoint))
        # A signal after the last step stops all processes: none waits for another that leaves.
        received = next(filter(None, ranks.gather_objects(stop_signals.received)), None)
        if received is not None:
            raise StoppedBySignalError(received)
    assert start.scores is not None
    if not trainer.is_deepspeed_enabled:
        # Free gradients and optimizer states, three times the weights. DeepSpeed's engine owns its own and needs them.
        cast(nn.Module, trainer.model).zero_grad(set_to_none=True)
        trainer.optimizer = trainer.callback_handler.optimizer = None
        trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = None
        trainer.accelerator.free_memory()
    with in_memory("scoring the trained model"):
        after = _score(prepared, trainer.model_wrapped, progress, "Scoring the trained model")
    trained_counts = trained_totals(trainer.state.log_history)
    results = ranks.on_main(partial(_write_results, prepared, start.scores, after, trained_counts))
    result = RunResult(folder, trainer.layers, results, trainer.model, start.scores, trainer.state.log_history)
    trained = gathered_model(trainer, partial(_load_starting_model, config, adapters=True))

    def save() -> None:
        write_text(folder / "README.md", model_card(config, result.layers, results))
        result.model = save_model(trained, prepared.tokenizer, folder, dtype=prepared.dtype)

    ranks.on_main(save)
    return result


def _load_starting_model(config: RunConfig, *, adapters: bool = False) -> PreTrainedModel:
    """Load the starting model on the CPU; with `adapters` add the fresh adapters of a run that trains some."""
    # Full fine-tuning keeps float32 weights, since bfloat16 ones lose small updates; adapters leave the base as it is.
    full = "float32" if config.lora is None else "auto"
    model = merge_adapters(
        load_model(
            config.model,
            dtype=full if config.dtype == "auto" else config.dtype,
            quantize=config.quantize,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
        )
    )
    return add_adapters(model, build_lora_config(config.lora, model)) if adapters and config.lora is not None else model


class _StartScores(TrainerCallback):
    """Held-out scores of the starting model, measured once in the life of a run.

    Measured before training; a model that will be sharded is measured when it is, since it may not fit into one process.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        trainer: DeepSupervisionTrainer,
        progress: Progress,
        scores: Scores | None,
        *,
        resume: bool,
    ) -> None:
        args = prepared.args
        self._key = {
            "rows": pairs_digest(prepared.validation),
            "batch_size": args.per_device_eval_batch_size,
            "bf16": bool(args.bf16),
        }
        self._prepared, self._trainer, self._progress = prepared, trainer, progress
        if scores is None and resume:
            scores = ranks.on_main(lambda: read_start_scores(prepared.folder, self._key))
        self.scores = scores
        if scores is not None:
            return
        # DeepSpeed places the model later: it is still on the CPU.
        if not (is_sharded(trainer) or trainer.is_deepspeed_enabled):
            self.on_train_begin()
        elif prepared.checkpoint is None:
            trainer.add_callback(self)
        else:
            raise UsageError(
                f"{prepared.folder}: its start-scores.json is of other held-out rows or settings; resume with "
                "per_device_eval_batch_size, bf16 and data as they were"
            )

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.scores is None:
            title = "Scoring the starting model"
            scores = _score(self._prepared, self._trainer.model_wrapped, self._progress, title)
            ranks.on_main(lambda: write_start_scores(self._prepared.folder, self._key, scores))
            self.scores = scores


def _score(prepared: PreparedRun, model: Any, progress: Progress, title: str) -> Scores:
    scores = {}
    for side, examples in heldout_examples(prepared.validation).items():
        with progress(f"{title} ({side})", len(examples)) as advance:
            scores[side] = score_answers(
                model,
                examples,
                pad_token_id=prepared.tokenizer.pad_token_id,
                batch_size=prepared.args.per_device_eval_batch_size,
                autocast=prepared.args.bf16,
                progress=advance,
                shared_out=True,
            )
    return scores


def _write_results(prepared: PreparedRun, before: Scores, after: Scores, trained: Mapping[str, int]) -> dict[str, Any]:
    """Write `results.json` with the held-out NLL in every language, and every row's score for paired tests.

    Args:
        trained: rows and tokens of the whole training, as in `trained_totals`.
    """
    config, sources = prepared.config, prepared.validation.sources
    tasks, items = {}, []
    for side, scores in after.items():
        pairs = [pair for pair in prepared.validation if getattr(pair, side) is not None]
        scored = list(zip(pairs, scores, before[side], strict=True))
        codes = ["en"] if side == "english" else config.data.languages or ["target"]
        # Answers of two parts are other texts than those of other methods: no column of `compare` holds both.
        two_parts = side == "target" and METHODS[config.method].pivot_marker is not None
        benchmark = "heldout_pivot" if two_parts else "heldout"
        for language in codes:
            rows = [row for row in scored if len(codes) == 1 or row[0].language == language]
            if rows:
                name = f"{benchmark}_{language}"
                figures = [row[1] for row in rows], [row[2] for row in rows]
                tasks[name] = _heldout_task(benchmark, language, *figures)
                # An item is named by its row's number in the file: other seeds hold out other rows, and only equal rows
                # are paired.
                items += [
                    {"task": name, "item": row_name(pair.number, sources), "nll": score.nll, "tokens": score.tokens}
                    | {"base_nll": base.nll}
                    for pair, score, base in rows
                ]
    results = {"model": config.model, "method": config.method, "trained": trained, "tasks": tasks}
    # Items first: results without them could not be compared.
    write_items(prepared.folder / "results.items.jsonl.gz", items)
    write_json(prepared.folder / "results.json", results)
    return results


def _heldout_task(
    benchmark: str, language: str, scores: Sequence[RowScore], before: Sequence[RowScore]
) -> dict[str, Any]:
    """Return the entry of a language's held-out rows in `results.json`."""
    summary, start = summarize(scores), summarize(before)
    figure = {"value": summary.nll, "stderr": summary.stderr, "n": summary.rows, "higher_is_better": False}
    return {
        "metric": "nll",
        **figure,
        "benchmark": benchmark,
        "language": language,
        "split": "validation",
        "metrics": {"nll": {**figure, "form": "ratio", "fields": ["nll", "tokens"], "scale": 1.0}},
        "nll_per_character": summary.nll_per_character,
        "base": {"value": start.nll, "stderr": start.stderr, "nll_per_character": start.nll_per_character},
    }


# ---- faults of the machine ----


@contextmanager
def explained_faults(folder: Path) -> Iterator[None]:
    """Turn a known fault into one line that names the run's last good checkpoint; other errors pass unchanged.

    Raises:
        UsageError: the disk is full or not writable.
        TrainingError: the run's folder has vanished, a data worker has died, or another rank is lost.
    """
    try:
        yield
    except (TrainingError, UsageError):
        raise
    except (OSError, RuntimeError) as error:
        explained = _explain_fault(error, folder)
        if explained is None:
            raise
        raise explained from error


def _explain_fault(error: OSError | RuntimeError, folder: Path) -> Exception | None:
    """Return a known fault as an exception with a message of one line, or None."""
    if isinstance(error, OSError) and not folder.is_dir():
        return TrainingError(
            f"output_dir: {folder} has vanished during the run; what it held is gone, start again with the same command"
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename or folder
        # A full disk always is that of the run's folder.
        is_full = error.errno in (*DISK_FULL, errno.EROFS)
        if is_full or (error.filename and Path(str(where)).resolve().is_relative_to(folder.resolve())):
            return UsageError(
                f"{where}: cannot be written ({error.strerror}); {kept(folder)}; {write_advice(error)} and go on with "
                "--resume"
            )
    if worker := _WORKER.search(str(error)):
        killed = f" by {worker[2]}" if worker[2] else ""
        return TrainingError(
            f"a data worker (process {worker[1].strip()}) was killed{killed}, often for lack of memory; {kept(folder)}; "
            "lower training.dataloader_num_workers or free memory, and go on with --resume"
        )
    if ranks.world_size() > 1 and _LOST_RANK.search(str(error)):
        # gloo begins with its own source file.
        reason = re.sub(r"^\[[^]]*:\d+\] ", "", " ".join(str(error).split())).partition(". ")[0][:160]
        timed_out = ", with a longer faults.hang_timeout if that rank was only slow" if "imed out" in reason else ""
        return TrainingError(
            f"lost the connection to another rank ({reason}); {kept(folder)}; go on with --resume{timed_out}"
        )
    return None
