"""Start this machine's two processes as `torchrun` would, and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rendezvous import Rendezvous

HERE = Path(__file__).resolve().parent


def start(command: list[str], *, rank: int, rendezvous: Rendezvous, log: Path, **env: str) -> subprocess.Popen:
    """One process of a group; it talks to the others on this machine only, and writes to `log`."""
    settings = {
        **os.environ,
        **rendezvous.environment(rank),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # What tests import, and this very package.
        "PYTHONPATH": os.pathsep.join(
            map(str, (HERE, HERE.parent, HERE.parents[1] / "src", os.environ.get("PYTHONPATH", "")))
        ),
        **env,
    }
    with log.open("w") as output:
        return subprocess.Popen(
            command, env=settings, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )


def run_together(
    command: list[str], folder: Path, *, world_size: int = 2, timeout: float = 480, **env: str
) -> list[str]:
    """Run a command on all ranks until they end, and give what each printed.

    Args:
        timeout: seconds for all of them together; less than the tests' own limit, which would not say what they printed.

    Raises:
        AssertionError: a rank failed or did not end; with what all of them printed.
    """
    rendezvous = Rendezvous(world_size)
    until = time.monotonic() + timeout
    logs = [folder / f"log-{rank}.txt" for rank in range(world_size)]
    processes = [start(command, rank=rank, rendezvous=rendezvous, log=log, **env) for rank, log in enumerate(logs)]
    try:
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    texts = [log.read_text(errors="replace") for log in logs]
    codes = [process.returncode for process in processes]
    assert codes == [0] * world_size, f"exit codes {codes}:\n" + "\n".join(text[-4000:] for text in texts)
    return texts


def run_cases(engine: str, folder: Path, names: list[str]) -> None:
    """Train cases (see `cases.py`) on two processes; results lie in `folder` by name."""
    env = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"} if engine.startswith("zero") else {}
    run_together([sys.executable, str(HERE / "worker.py"), engine, str(folder), *names], folder, **env)
