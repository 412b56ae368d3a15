"""Real processes for tests, forked from one server that has imported everything once; groups of ranks among them.

The server (`python -m process_pool`) reads a JSON request a line from stdin and answers with a JSON line:
    {"start": {"arguments": [...], "program": "module:function", "faults": {...}, "log": path, "environment": {...}}}
        ->  {"pid": ...}; without a program the arguments are those of `pivotune`
    {"poll": pid}  ->  {"code": exit code, negative for a signal, or null while it runs}
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PATIENCE = 300.0  # seconds; only a test that fails waits so long


class Server:
    """Starts processes; see the module.

    Attributes:
        shared: a folder for files that several tests use.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.shared = Path(self._folder.name)
        # A killed process leaves its temporary files; they go with this folder.
        temporary = self.shared / "temporary"
        temporary.mkdir()
        paths = [TESTS.parent / "src", TESTS, TESTS / "distributed", *filter(None, sys.path)]
        settings = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "process_pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(temporary)},
        )

    def close(self) -> None:
        # Closes its pipes, at which it ends, and waits.
        self._process.__exit__(None, None, None)
        self._folder.cleanup()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@cache
def server() -> Server:
    """Return the server of this session."""
    started = Server()
    atexit.register(started.close)
    return started


class Process:
    """One process of the server; `code` is None while it runs."""

    def __init__(self, log: Path, **request: Any) -> None:
        self._log = log
        self.pid = server().ask({"start": {"log": str(log), **request}})["pid"]
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = server().ask({"poll": self.pid})["code"]
        return self.code

    def wait(self) -> int:
        wait_for(lambda: self.poll() is not None, "the process to end")
        assert self.code is not None
        return self.code

    def wait_for_marker(self, marker: Path) -> None:
        wait_for(lambda: marker.exists() or self.poll() is not None, str(marker))
        assert marker.exists(), f"the process ended with {self.code} before: {self.output}"

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def send_to_all(self, number: int) -> None:
        """Send a signal to it and to the processes that it started, as Slurm and Kubernetes do."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_to_all(signal.SIGKILL)
            self.wait()

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


def wait_for(condition: Callable[[], bool], what: str, *, patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until, f"waited {patience:.0f} s for {what}"
        time.sleep(0.01)


# ---- ranks ----


class Rendezvous:
    """Meeting place of a group of ranks, as `torchrun` arranges it: the store is here, every rank is its client.

    Its port is never free as long as this object lives, so that no other process takes it in between.
    """

    def __init__(self, world_size: int) -> None:
        from torch.distributed import TCPStore

        self.world_size = world_size
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables of one rank, all of them on this machine."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


def run_ranks(
    folder: Path, *, world_size: int = 2, environment: dict[str, str] | None = None, **request: Any
) -> list[str]:
    """Run a program on all ranks until they end and return the output of each.

    Raises:
        AssertionError: a rank failed or did not end; holds the output of all of them.
    """
    meeting = Rendezvous(world_size)
    environments = [{**meeting.environment(rank), **(environment or {})} for rank in range(world_size)]
    ranks = [Process(folder / f"log-{rank}.txt", environment=each, **request) for rank, each in enumerate(environments)]
    try:
        wait_for(lambda: None not in [rank.poll() for rank in ranks], "the ranks to end", patience=480)
    finally:
        for rank in ranks:
            rank.kill()
        codes, texts = [rank.code for rank in ranks], [rank.output for rank in ranks]
        print("\n".join(text[-4000:] for text in texts))
    assert codes == [0] * world_size, f"exit codes {codes}:\n" + "\n".join(text[-4000:] for text in texts)
    return texts


# ---- in the server ----


def _run(request: dict[str, Any]) -> int:
    """Run a request in the child."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request.get("environment", {}))
    # Only now: the command line reads its rank from the environment when it is imported.
    from faults import injection

    from pivotune.cli.main import main

    try:
        injection.inject(request.get("faults", {}))
        if "program" in request:
            module, function = request["program"].split(":")
            return getattr(importlib.import_module(module), function)(*request["arguments"]) or 0
        return main(request["arguments"])
    except BaseException:
        traceback.print_exc()
        return 99


def _serve() -> None:
    """Serve until stdin is closed; then kill the processes that a failed test left."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            # A group of its own, made on both sides: it exists before the child acts or the caller gets an answer.
            os.setpgid(pid, pid or os.getpid())
            if pid == 0:
                code = _run(request["start"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            running.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    # Imported ahead of the forks; conftest also spares them the waiting for the disk.
    import conftest  # noqa: F401
    import typer  # noqa: F401
    from faults import injection  # noqa: F401
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: F401

    import pivotune.runs.execute  # noqa: F401

    # The full collection that ends each training leaves these imports out.
    gc.freeze()
    _serve()
