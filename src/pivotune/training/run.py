"""One run from configuration to run folder: what `pivotune train` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import IntervalStrategy, PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from pivotune.config import RunConfig, needed_by
from pivotune.data.datasets import split_validation
from pivotune.data.examples import EncodingReport, Pair
from pivotune.data.pair_store import store_pairs
from pivotune.data.sources import Rows, load_rows
from pivotune.errors import UsageError
from pivotune.layers.analysis import LayerAnalysis, read_layers_json, write_layers_json
from pivotune.layers.measure import analyze_layers, num_sequences
from pivotune.model.architecture import check_architecture
from pivotune.model.loading import check_model, load_model, load_tokenizer, read_config
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments
from pivotune.training.callbacks import MetricsFile
from pivotune.training.checkpoints import last_checkpoint, staged_folder
from pivotune.training.heldout import RowScore, score_answers, summarize
from pivotune.training.lora import build_lora_config, check_adapters, merge_adapters
from pivotune.training.model_card import model_card
from pivotune.training.preparation import (
    build_encoder,
    build_train_dataset,
    check_layers,
    heldout_examples,
    spread,
)
from pivotune.training.progress import Progress, silent
from pivotune.training.run_folder import claim_run_folder, write_items, write_json, write_run_config, write_text
from pivotune.training.trainer import DeepSupervisionTrainer

# Held-out scores by side: `target` and `english`.
Scores = dict[str, list[RowScore]]


@dataclass
class PreparedRun:
    """Everything that was checked before a weight was loaded."""

    config: RunConfig
    args: DeepSupervisionConfig
    folder: Path
    tokenizer: Any
    train: Sequence[Pair]
    validation: Sequence[Pair]
    report: EncodingReport
    skipped: dict[str, int]
    dtype: torch.dtype


@dataclass
class RunResult:
    """What a finished run left behind."""

    folder: Path
    layers: LayerAnalysis | None
    results: dict[str, Any]
    model: Any
    before: Scores
    log_history: list[dict[str, Any]] = field(default_factory=list)


def prepare_run(config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> PreparedRun:
    """Check the output folder, the model's files, the arguments and all rows; nothing slow, nothing written.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    source = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    check_model(config.model, **source)
    model_config = read_config(config.model, **source)
    check_architecture(model_config.model_type)
    args = build_arguments(config)
    if config.method == "deep-supervision":
        check_layers(args.supervision(), model_config.get_text_config().num_hidden_layers)
    tokenizer = load_tokenizer(config.model, **source)
    encoder = build_encoder(args, tokenizer, model_config)
    rows, validation_rows, skipped = _load_data(config)
    train = store_pairs(encoder.encode_lazily(rows, on_bad_row=config.data.on_bad_row, source=config.data.train))
    validation = store_pairs(encoder.encode_lazily(validation_rows, on_bad_row="skip"))
    _check_rows(config, args, train, validation, encoder.report)
    build_train_dataset(train, args, model_config)
    if config.lora is not None:
        check_adapters(config.lora, model_config, trust_remote_code=config.trust_remote_code)
    _check_apart(config)
    folder = claim_run_folder(config, overwrite=overwrite, resume=resume)
    dtype = getattr(model_config, "dtype", None) or torch.float32
    return PreparedRun(config, args, folder, tokenizer, train, validation, encoder.report, skipped, dtype)


def execute_run(
    prepared: PreparedRun,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    before: Scores | None = None,
) -> RunResult:
    """Load the model, choose layers, train, evaluate and save. See `prepare_run` for everything that can be wrong.

    Args:
        before: the starting model's held-out scores, where another run from the same start has measured them.
    """
    progress = progress or silent
    config, args, folder = prepared.config, prepared.args, prepared.folder
    write_run_config(folder, config)
    model = load_model(
        config.model,
        dtype=_dtype(config),
        quantize=config.quantize,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    model = merge_adapters(model)
    if config.quantize is None:
        cast(nn.Module, model).to(args.device)
    layers = _earlier_layers(folder) if resume else None
    layers = layers or _measure(prepared, model, progress)
    before = before or _score(prepared, model, progress, "Scoring the starting model")
    trainer = DeepSupervisionTrainer(
        model,
        args,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation or None,
        processing_class=prepared.tokenizer,
        peft_config=None if config.lora is None else build_lora_config(config.lora, model),
        layers=layers,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), *callbacks],
        progress=progress,
    )
    # Without tqdm Transformers prints every log line; ours go to metrics.jsonl and the caller's callbacks.
    trainer.remove_callback(PrinterCallback)
    if trainer.layers is not None:
        write_layers_json(folder / "layers.json", trainer.layers)
    _train(trainer, last_checkpoint(folder) if resume else None)
    _free_optimizer(trainer)
    after = _score(prepared, trainer.model, progress, "Scoring the trained model")
    results = _write_results(prepared, before, after)
    result = RunResult(folder, trainer.layers, results, trainer.model, before, trainer.state.log_history)
    write_text(folder / "README.md", model_card(config, result.layers, results))
    result.model = save_model(trainer.model, prepared.tokenizer, folder, dtype=prepared.dtype)
    return result


def _earlier_layers(folder: Path) -> LayerAnalysis | None:
    """A resumed run supervises the layers it began with, whatever another machine would measure."""
    path = folder / "layers.json"
    return read_layers_json(path) if path.is_file() else None


def _train(trainer: DeepSupervisionTrainer, checkpoint: Path | None) -> None:
    """Train, or only load the weights of a checkpoint that has reached the end: `Trainer` would do one step more."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    args = trainer.args
    done = state.global_step >= args.max_steps if args.max_steps > 0 else (state.epoch or 0) >= args.num_train_epochs
    if done:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _free_optimizer(trainer: DeepSupervisionTrainer) -> None:
    """Give back what only training needs, three times the weights; the trainer sits in cycles and would keep it."""
    cast(nn.Module, trainer.model).zero_grad(set_to_none=True)
    trainer.optimizer = trainer.callback_handler.optimizer = None
    trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()


def save_model(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """Write `model/`, a plain Hugging Face folder in the starting model's dtype; adapters also apart in `adapter/`.

    Adapters are merged, so that `AutoModelForCausalLM` and vLLM load the folder; those on a quantized base are not
    (merging would round them away) and `model/` then holds the adapters alone. Returns the model as it was saved.
    """
    quantized = getattr(model, "quantization_method", None) or getattr(model.config, "quantization_config", None)
    if hasattr(model, "peft_config") and not quantized:
        with staged_folder(folder / "adapter") as staging:
            model.save_pretrained(staging)
        model = model.merge_and_unload()
    with staged_folder(folder / "model") as staging:
        if not quantized:
            _cast_weights(model, dtype)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return model


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Only the weights: `model.to` would also round the rotary frequencies, which no model folder holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _check_rows(
    config: RunConfig,
    args: DeepSupervisionConfig,
    train: Sequence[Pair],
    validation: Sequence[Pair],
    report: EncodingReport,
) -> None:
    if not train:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in report.skipped.items())
        raise UsageError(f"{config.data.train}: no row is left to train on ({reasons})")
    if args.eval_strategy != "no" and not validation:
        raise UsageError(
            f"training.eval_strategy: {IntervalStrategy(args.eval_strategy).value} needs held-out rows and "
            f"data.validation: {config.data.validation} gives none"
        )


def _check_apart(config: RunConfig) -> None:
    """A run replaces what is in its folder: the model it starts from must not be there."""
    model, folder = Path(config.model).expanduser().resolve(), Path(config.output_dir).resolve()
    if model.exists() and model.is_relative_to(folder):
        raise UsageError(
            f"output_dir: {config.output_dir} holds the model to start from ({config.model}); choose another"
        )


def _load_data(config: RunConfig) -> tuple[Sequence[Any], Sequence[Any], dict[str, int]]:
    rows = _load(config, config.data.train, config.data.english, heldout=False)
    validation = config.data.validation
    if isinstance(validation, str):
        heldout = _load(config, validation, config.data.validation_english, heldout=True)
        return rows, heldout, rows.skipped
    train, held = split_validation(rows, validation, config.seed)
    return train, held, rows.skipped


def _load(config: RunConfig, source: str, english: str | None, *, heldout: bool) -> Rows:
    return load_rows(
        source,
        english=english,
        need_target=config.method != "sft",
        need_english=config.method == "sft" or (config.needs_english and not heldout),
        on_bad_row=config.data.on_bad_row,
        needed_by=needed_by(config.method, config.data.english_ratio),
        limit=None if heldout else config.data.limit,
    )


def _dtype(config: RunConfig) -> Any:
    """Full fine-tuning keeps float32 weights, since bfloat16 ones lose small updates; adapters leave the base as it is."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if config.lora is None else "auto"


def _measure(prepared: PreparedRun, model: PreTrainedModel, progress: Progress) -> LayerAnalysis | None:
    if prepared.config.method != "deep-supervision":
        return None
    pairs = spread(prepared.train, prepared.args.profile_rows)
    with progress("Measuring the layers", num_sequences(pairs)) as advance:
        return analyze_layers(
            model,
            prepared.tokenizer,
            pairs,
            model_name=prepared.config.model,
            language=prepared.config.data.language,
            progress=advance,
        )


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
            )
    return scores


def _write_results(prepared: PreparedRun, before: Scores, after: Scores) -> dict[str, Any]:
    """`results.json` with the held-out NLL in both languages, and every row's score for paired tests."""
    tasks, items = {}, []
    for side, scores in after.items():
        name = f"heldout_{_language(prepared, side)}"
        summary, start = summarize(scores), summarize(before[side])
        figure = {"value": summary.nll, "stderr": summary.stderr, "n": summary.rows, "higher_is_better": False}
        tasks[name] = {
            "metric": "nll",
            **figure,
            "benchmark": "heldout",
            "language": _language(prepared, side),
            "split": "validation",
            "metrics": {"nll": {**figure, "form": "ratio", "fields": ["nll", "tokens"], "scale": 1.0}},
            "nll_per_character": summary.nll_per_character,
            "base": {"value": start.nll, "stderr": start.stderr, "nll_per_character": start.nll_per_character},
        }
        items += [
            {"task": name, "item": row, "nll": score.nll, "tokens": score.tokens, "base_nll": base.nll}
            for row, score, base in zip(_row_numbers(prepared, side), scores, before[side], strict=True)
        ]
    results = {"model": prepared.config.model, "method": prepared.config.method, "tasks": tasks}
    write_json(prepared.folder / "results.json", results)
    write_items(prepared.folder / "results.items.jsonl.gz", items)
    return results


def _language(prepared: PreparedRun, side: str) -> str:
    return "en" if side == "english" else prepared.config.data.language or "target"


def _row_numbers(prepared: PreparedRun, side: str) -> list[int]:
    """Where the rows stand in their file: other seeds hold out other rows, and only equal ones may be paired."""
    return [pair.number for pair in prepared.validation if getattr(pair, side) is not None]
