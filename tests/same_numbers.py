"""Record the numbers of a fixed set of runs, and compare them later: the proof that a refactor changed nothing.

    PYTHONPATH=tests python -m same_numbers record before.json
    PYTHONPATH=tests python -m same_numbers compare before.json

Run both on the same machine: other processors round differently. Every case is `pivotune train` on a tiny random model;
`--real` adds one run of the small real model on `../shared/data`. Recorded are all log lines without times, the digest of
the final weights, `results.json`, `layers.json` and the digest of the per-item scores.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from conftest import SHARED, build_tiny_model, build_tiny_tokenizer, tiny_rows
from safetensors.numpy import load_file

from pivotune.config.supervision import SupervisionConfig

_LAYERS = {"conversion": {"layer": 1}, "thinking": {"layer": 3}}
_FEATURE = {name: {**section, "signal": "feature", "weight": 0.5} for name, section in _LAYERS.items()}
# Case -> changes of the settings below. A key with dots is a path.
CASES: dict[str, dict[str, Any]] = {
    "logits": {},
    "auto-layers": {"supervision": {}},
    "constant-schedule": {"supervision.schedule": "constant"},
    "cosine-schedule": {"supervision.schedule": "cosine"},
    "positional": {"supervision.logits": {"mode": "positional"}},
    "separate-passes": {"supervision.logits": {"forward": "separate"}},
    "no-norm": {"supervision.logits": {"norm": "none"}},
    "conversion-only": {"supervision.thinking": {"signal": "none"}},
    "thinking-only": {"supervision.conversion": {"signal": "none"}},
    "feature": {"supervision": _FEATURE},
    "feature-joint": {"supervision": {**_FEATURE, "feature": {"english": "joint", "pooling": "last"}}},
    "feature-frozen": {"supervision": {**_FEATURE, "feature": {"english": "frozen", "span": "query+answer"}}},
    "feature-raw": {"supervision": {**_FEATURE, "feature": {"english_norm": "raw"}}},
    "mixed-signals": {"supervision": {"conversion": _LAYERS["conversion"], "thinking": _FEATURE["thinking"]}},
    "tft": {"method": "tft"},
    "tft-no-replay": {"method": "tft", "data.english_ratio": 0.0},
    "sft": {"method": "sft"},
    "no-replay": {"data.english_ratio": 0.0},
    "lora": {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
    "random-order": {"training.train_sampling_strategy": "random"},
    "checkpointing": {"training.gradient_checkpointing": True},
    "epoch-evaluation": {"training.eval_strategy": "epoch"},
    "gemma2": {"model": "gemma2"},
    "gpt2": {"model": "gpt2"},
    "two-ranks": {"ranks": 2},
    "resumed": {"training.save_strategy": "steps", "training.save_steps": 3, "resume": 3},
}
# Of the clock, or logged and written since the first recording.
_LEFT_OUT = ("runtime", "per_second", "total_flos", "gradient_share", "cosine")
_NEW_IN_LAYERS = ("lens", "reading", "reasons")


def settings_of(case: str, folder: Path) -> dict[str, Any]:
    """The run configuration of a case, with the pseudo-keys `ranks` and `resume` still in it."""
    settings: dict[str, Any] = {
        "model": "llama",
        "method": "deep-supervision",
        "data": {"train": str(folder / "rows.jsonl"), "validation": 4, "language": "sw"},
        "supervision": dict(_LAYERS),
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
        },
        "output_dir": str(folder / "runs" / case),
    }
    for key, value in CASES[case].items():
        *parents, last = key.split(".")
        section = settings
        for name in parents:
            section[name] = section = dict(section.get(name, {}))
        section[last] = value
    settings["model"] = str(folder / settings["model"])
    settings["supervision"] = _raw(settings["supervision"])
    return settings


def _raw(supervision: dict[str, Any]) -> dict[str, Any]:
    """Name what were the defaults when the numbers were recorded; code before that knows no other."""
    if "layers" not in SupervisionConfig.model_fields:
        return supervision
    logits = {"gradient": "all", **supervision.get("logits", {})}
    return {"lens": "logit", "layers": "paper", **supervision, "logits": logits}


def real_settings(folder: Path) -> dict[str, Any]:
    """Two steps of the small real model on 24 real rows."""
    return {
        "model": "bundled:smollm2-135m-instruct",
        "data": {"train": str(SHARED / "data/train/vi.jsonl.gz"), "limit": 24, "validation": 4, "language": "vi"},
        "supervision": _raw({"profile_rows": 4}),
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"},
        "output_dir": str(folder / "runs" / "real"),
    }


def run(case: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train as a user would and return what is compared."""
    ranks, resume = settings.pop("ranks", 1), settings.pop("resume", None)
    config = folder / f"{case}.yaml"
    config.write_text(yaml.safe_dump(settings))
    if resume is not None:
        # The schedule depends on the number of steps: the first process is stopped, not given fewer.
        _train(config, ranks, {"PIVOTUNE_STOP_AT": str(resume)})
    _train(config, ranks, {}, *(["--resume"] if resume is not None else []))
    return read_numbers(Path(settings["output_dir"]))


def _train(config: Path, ranks: int, environment: dict[str, str], *options: str) -> None:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    stop_at = environment.get("PIVOTUNE_STOP_AT")
    program = ["same_numbers", "stop", stop_at] if stop_at else ["pivotune", "train"]
    done = subprocess.run(
        [*launcher, *program, str(config), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != (75 if stop_at else 0):
        raise RuntimeError(f"{config.stem}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def stop(step: int, config: str) -> int:
    """Train in this process and send it SIGTERM after a step; the run saves a checkpoint and leaves with 75."""
    import signal

    from transformers import Trainer

    from pivotune.cli.main import main

    step_done = Trainer._maybe_log_save_evaluate

    def stop_after(self: Any, *args: Any, **kwargs: Any) -> None:
        step_done(self, *args, **kwargs)
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._maybe_log_save_evaluate = stop_after
    return main(["train", config])


def read_numbers(folder: Path) -> dict[str, Any]:
    """Everything in a run folder that must not change."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    items = gzip.decompress((folder / "results.items.jsonl.gz").read_bytes())
    path = folder / "layers.json"
    layers = {**json.loads(path.read_text()), "model": ""} if path.is_file() else None
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model" / "model.safetensors").items()):
        digest.update(name.encode() + tensor.tobytes())
    results = json.loads((folder / "results.json").read_text())
    results["model"] = Path(results["model"]).name
    return {
        "metrics": [{k: v for k, v in line.items() if not any(word in k for word in _LEFT_OUT)} for line in lines],
        "weights": digest.hexdigest(),
        "results": results,
        "layers": layers and {key: value for key, value in layers.items() if key not in _NEW_IN_LAYERS},
        "items": hashlib.sha256(items).hexdigest(),
    }


def measure(cases: list[str], *, real: bool) -> dict[str, Any]:
    """The numbers of all cases, two runs at a time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in ("llama", "gemma2", "gpt2"):
            build_tiny_model(family).save_pretrained(folder / family)
            build_tiny_tokenizer().save_pretrained(folder / family)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(28)))
        jobs = {case: settings_of(case, folder) for case in cases}
        if real:
            jobs["real"] = real_settings(folder)
        with ThreadPoolExecutor(max_workers=2) as pool:
            found = pool.map(lambda job: run(*job, folder), jobs.items())
            return dict(zip(jobs, found, strict=True))


def main() -> int:
    if sys.argv[1] == "stop":
        return stop(int(sys.argv[2]), sys.argv[3])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    found = json.loads(json.dumps(measure(options.cases, real=options.real)))
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    known = json.loads(options.file.read_text())
    changed = {
        case: [part for part in numbers if numbers[part] != known[case].get(part)] for case, numbers in found.items()
    }
    for case, parts in changed.items():
        print(f"{case}: {'same' if not parts else 'CHANGED: ' + ', '.join(parts)}")
    return int(any(changed.values()))


if __name__ == "__main__":
    raise SystemExit(main())
