"""Check a run before a weight is loaded: folder, model files, arguments, rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.data.collator import ExampleDataset
from pivotune.data.examples import EncodingReport
from pivotune.data.pair_store import PairStore
from pivotune.errors import UsageError
from pivotune.estimate.rows import training_schedule
from pivotune.models.adapters import check_adapters
from pivotune.models.architecture import check_architecture
from pivotune.models.loading import check_model, load_tokenizer, read_config
from pivotune.runs.folder import claim_run_folder
from pivotune.runs.record import check_rows_record
from pivotune.text.words import counted
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments, optimizer_name
from pivotune.training.distributed import ranks
from pivotune.training.distributed.strategies import check_sharding
from pivotune.training.layer_choice import check_layers
from pivotune.training.lens_fitting import check_lens_rows
from pivotune.training.phase import check_phase
from pivotune.training.preparation import (
    build_encoder,
    build_train_dataset,
    check_evaluation,
    encode_rows,
    heldout_examples,
    load_run_rows,
)
from pivotune.training.resilience.checkpoint_safety import check_checkpoint
from pivotune.training.resilience.checkpoints import check_states, restore_replaced, whole_checkpoint
from pivotune.training.stand_in import check_setup


@dataclass
class PreparedRun:
    """A checked run.

    Attributes:
        skipped, heldout_skipped: rows left out in reading and encoding, by reason.
        config: the configuration, with all languages of the rows in `data.language`.
        notes: lines about weights and languages, and about columns and turns that are not used.
        checkpoint: the checkpoint that a resumed run continues from; None for a new run and where there is none.
    """

    config: RunConfig
    args: DeepSupervisionConfig
    folder: Path
    tokenizer: Any
    train: PairStore
    validation: PairStore
    report: EncodingReport
    skipped: Counter[str]
    heldout_skipped: Counter[str]
    notes: list[str]
    dtype: torch.dtype
    checkpoint: Path | None = None


def prepare_run(
    config: RunConfig, *, overwrite: bool = False, resume: bool = False, choose_checkpoint: bool = True
) -> PreparedRun:
    """Check the output folder, the model's files, the arguments and all rows; write nothing.

    Args:
        choose_checkpoint: choose the checkpoint of a resumed run, and undo a replacement that was left half done.

    Raises:
        UsageError: the first mistake, in one line.
    """
    source = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    check_model(config.model, **source)
    model_config = read_config(config.model, **source)
    check_architecture(model_config.model_type)
    args = build_arguments(config)
    check_sharding(args, quantized=config.quantize is not None, optimizer=optimizer_name(args))
    check_setup(args, model_config, trust_remote_code=config.trust_remote_code)
    if METHODS[config.method].inner_losses:
        check_layers(args.supervision, model_config.get_text_config().num_hidden_layers)
    tokenizer = load_tokenizer(config.model, **source)
    encoder = build_encoder(args, tokenizer, model_config)
    rows, report = load_run_rows(config), encoder.report
    config, args.data = rows.config, rows.config.data
    train = encode_rows(rows.train, encoder, on_bad_row=config.data.on_bad_row, sources=rows.sources)
    unfit = report.skipped.copy()
    validation = encode_rows(rows.heldout, encoder, on_bad_row="skip", sources=rows.heldout_sources)
    skipped, heldout_skipped = rows.skipped + unfit, rows.heldout_skipped + (report.skipped - unfit)
    if not train:
        reasons = "; ".join(f"{counted(count)}: {reason}" for reason, count in skipped.items())
        raise UsageError(f"{', '.join(rows.sources)}: no row is left to train on ({reasons})")
    heldout = heldout_examples(validation, by_language=True)
    check_evaluation(args, heldout, f"data.validation: {config.data.validation} gives none")
    dataset = cast(ExampleDataset, build_train_dataset(train, args, model_config))
    if (budget := config.data.token_budget) is not None:
        tokens = dataset.lengths.sum()
        rows.notes.append(f"data.token_budget {budget:,}: {counted(len(dataset))} an epoch with {tokens:,} tokens")
    if METHODS[config.method].inner_losses:
        check_phase(args.supervision, training_schedule(args, len(dataset), args.world_size).steps)
        check_lens_rows(args.supervision, train)
    if config.lora is not None:
        check_adapters(config.lora, model_config, trust_remote_code=config.trust_remote_code)
    model, output = Path(config.model).expanduser().resolve(), Path(config.output_dir).resolve()
    if model.exists() and model.is_relative_to(output):
        # A run replaces the files of its folder.
        raise UsageError(
            f"output_dir: {config.output_dir} holds the model to start from ({config.model}); choose another"
        )
    # The main process looks and, with `overwrite`, removes.
    folder = ranks.on_main(lambda: claim_run_folder(config, overwrite=overwrite, resume=resume))
    checkpoint = None
    if resume:
        checkpoint = ranks.on_main(lambda: _find_checkpoint(folder, train, choose=choose_checkpoint))
    dtype = getattr(model_config, "dtype", None) or torch.float32
    return PreparedRun(
        config,
        args,
        folder,
        tokenizer,
        train,
        validation,
        report,
        skipped,
        heldout_skipped,
        rows.notes,
        dtype,
        checkpoint,
    )


def _find_checkpoint(folder: Path, train: PairStore, *, choose: bool) -> Path | None:
    """Check that the rows are those of the run, and return the checkpoint to continue from; None with `choose` off."""
    if choose:
        restore_replaced(folder)
    check_rows_record(folder, train, ", ".join(train.sources))
    checkpoint = whole_checkpoint(folder) if choose else None
    if checkpoint is not None:
        check_states(checkpoint)
        check_checkpoint(checkpoint)
    return checkpoint
