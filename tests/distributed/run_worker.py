"""One of two processes: whole runs of `pivotune train`, stopped and resumed (`python run_worker.py ENGINE FOLDER`).

Runs `a` as FOLDER/run.yaml says, then `b`: `a` as it was at step 2, resumed; and `c`, where it is there: a run of one
process as it was at step 2.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from run_folders import as_it_was_at_step_2
from worker import shard_on_cpu

from pivotune.cli.main import main
from pivotune.training.distributed import ranks


def train(folder: Path, *words: str) -> None:
    # Accelerate leaves it for later programs of a process, and FSDP2 on a CPU is refused where it is asked for.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    code = main(["train", str(folder / "run.yaml"), *words])
    assert code == 0, f"exit code {code}"


def run(engine: str, folder: Path) -> None:
    if engine.startswith("fsdp2"):
        kind = "SHARDED_STATE_DICT" if engine == "fsdp2-sharded" else "FULL_STATE_DICT"
        shard_on_cpu(state_dict_type=kind)
    train(folder, "--set", f"output_dir={folder / 'a'}")
    ranks.on_main(lambda: as_it_was_at_step_2(folder / "a", folder / "b"))
    train(folder, "--set", f"output_dir={folder / 'b'}", "--resume")
    if (folder / "c").exists():
        train(folder, "--set", f"output_dir={folder / 'c'}", "--resume")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]))
    print(f"rank {os.environ['RANK']}: done", flush=True)
    torch.distributed.destroy_process_group()
