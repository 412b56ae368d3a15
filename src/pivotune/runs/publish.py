"""Write the model of a finished run as a Hugging Face folder of its own, and upload it to the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pivotune.config.settings import RunConfig
from pivotune.errors import UsageError
from pivotune.layers.layers_json import read_layers_json
from pivotune.models.loading import DTYPES, load_model, load_tokenizer
from pivotune.models.locating import one_line_errors
from pivotune.runs.folder import TRAINING_PICTURE, read_run_config
from pivotune.runs.model_card import model_card
from pivotune.text.files import apply_umask, write_text


def export_run(
    run: Path, to: Path, *, merge_lora: bool = False, dtype: str = "auto", interpolate: float = 1.0, name: str = ""
) -> Path:
    """Write a run's model, tokenizer and card into a new folder that does not depend on the run.

    Args:
        run: a finished run.
        to: a folder that does not exist, or is empty.
        merge_lora: write the whole model of a run with adapters; without it the adapters alone.
        dtype: of the weights; `auto` keeps theirs.
        interpolate: share of the trained weights; the rest are the starting ones.
        name: of the model in the card's example; the folder's if empty.

    Raises:
        UsageError: no finished run, adapters to merge in a run without any, a folder that is not empty or writable.
    """
    config = check_export(run, to, merge_lora=merge_lora, dtype=dtype)
    layers, results = run / "layers.json", run / "results.json"
    card = model_card(
        config,
        read_layers_json(layers) if layers.is_file() else None,
        json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"tasks": {}},
        name or to.name,
        figure=TRAINING_PICTURE if (run / TRAINING_PICTURE).is_file() else "",
    )
    try:
        to.mkdir(parents=True, exist_ok=True)
        if config.lora is not None and not merge_lora:
            _copy_adapters(_adapter_folder(run), to, dtype, interpolate)
        else:
            _whole_model(run, config, dtype, interpolate).save_pretrained(to)
        load_tokenizer(str(run), trust_remote_code=config.trust_remote_code).save_pretrained(to)
        for weights in to.glob("*.safetensors"):
            apply_umask(weights)
        write_text(to / "README.md", card)
        if (run / TRAINING_PICTURE).is_file():
            shutil.copy2(run / TRAINING_PICTURE, to)
    except OSError as error:
        raise UsageError(f"--to: {to} cannot be written ({error.strerror})") from error
    return to


def check_export(run: Path, to: Path | None = None, *, merge_lora: bool, dtype: str) -> RunConfig:
    """Return the configuration of a run that can be exported with these options; nothing is loaded, torch not imported.

    Raises:
        UsageError: as `export_run`.
    """
    if not (run / "config.yaml").is_file() or not (run / "model").is_dir():
        raise UsageError(
            f"{run}: not a finished run: no {'model/' if (run / 'config.yaml').is_file() else 'config.yaml'}"
        )
    config = read_run_config(run)
    if merge_lora and config.lora is None:
        raise UsageError(f"--merge-lora: {run} trained the whole model and has no adapters; leave it out")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: {dtype!r} found; allowed: {', '.join(DTYPES)}")
    if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"--to: {to} exists and is not an empty folder; choose another one")
    return config


def push_run(
    run: Path, repository: str, *, private: bool = False, dry_run: bool = False, **options: Any
) -> dict[str, int]:
    """Export a run and upload it as a model repository; return the names and sizes in bytes of its files.

    Args:
        repository: `owner/name` on the Hugging Face Hub; made if it does not exist.
        dry_run: check and export without uploading.
        options: of `export_run`.

    Raises:
        UsageError: as `export_run`; no possible name, not logged in, the Hub out of reach; adapters whose base model is a
            folder, which nobody else has.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    config = check_export(run, merge_lora=options.get("merge_lora", False), dtype=options.get("dtype", "auto"))
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository}: not a name on the Hugging Face Hub; allowed: owner/name") from error
    is_local = config.model.startswith("bundled:") or Path(config.model).expanduser().exists()
    if config.lora is not None and not options.get("merge_lora") and is_local:
        raise UsageError(f"{run}: adapters on {config.model}, which is not on the Hub; add --merge-lora")
    api = HfApi()
    if not dry_run:
        with one_line_errors(repository, "repository"):
            api.create_repo(repository, private=private, exist_ok=True)
    with TemporaryDirectory() as temporary:
        folder = export_run(run, Path(temporary) / "model", name=repository, **options)
        ModelCard.load(folder / "README.md")
        if not dry_run:
            with one_line_errors(repository, "repository"):
                api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with Pivotune")
        return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _whole_model(run: Path, config: RunConfig, dtype: str, interpolate: float) -> Any:
    """Return the model with its adapters merged, computed in the stored dtype and rounded to `dtype` at the end."""
    import torch

    from pivotune.models.adapters import merge_adapters
    from pivotune.runs.export import cast_weights
    from pivotune.training.averaging import interpolate_weights, is_lora_b, trained_weights

    folder = run / "model" if config.lora is None else _adapter_folder(run)
    model: Any = load_model(str(folder), trust_remote_code=config.trust_remote_code)
    with torch.no_grad():
        if config.lora is not None:
            for name, parameter in model.named_parameters():
                if is_lora_b(name):
                    parameter.mul_(interpolate)
            model = merge_adapters(model)
        elif interpolate < 1:
            options: Any = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
            start = merge_adapters(load_model(config.model, **options))
            weights = trained_weights(model)
            for name, tensor in interpolate_weights(weights, trained_weights(start), interpolate).items():
                weights[name].copy_(tensor)
    if dtype != "auto":
        cast_weights(model, getattr(torch, dtype))
    return model


def _adapter_folder(run: Path) -> Path:
    """Return the folder of the adapters: `model/` itself on a quantized base, with which they were not merged."""
    return run / "adapter" if (run / "adapter").is_dir() else run / "model"


def _copy_adapters(source: Path, to: Path, dtype: str, interpolate: float) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from pivotune.training.averaging import is_lora_b

    tensors = load_file(source / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        scaled = tensor * interpolate if is_lora_b(name) else tensor
        tensors[name] = scaled if dtype == "auto" else scaled.to(getattr(torch, dtype))
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "adapter_config.json", to / "adapter_config.json")
