"""Runs `pivotune` in real processes without paying for imports each time: one process imports everything and forks.

Reads a JSON request a line from stdin and answers with a JSON line:
    {"start": {"arguments": [...], "faults": {...}, "log": path, "environment": {...}}}  ->  {"pid": ...}
    {"poll": pid}  ->  {"code": exit code, negative for a signal, or null while it runs}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

from faults import injection
from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: F401  (imported ahead of the forks)

import pivotune.runs.execute  # noqa: F401
from pivotune.cli.main import main


def run(request: dict[str, Any]) -> int:
    """What happens in the child."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request.get("environment", {}))
    try:
        injection.inject(request.get("faults", {}))
        if "program" in request:
            return getattr(injection, request["program"])(*request["arguments"])
        return main(request["arguments"])
    except BaseException:
        traceback.print_exc()
        return 99


def serve() -> None:
    """Until stdin is closed; what runs then is killed, as a test that failed left it."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            # A group of its own, made on both sides: it is there before the child does or the caller hears anything.
            os.setpgid(pid, pid or os.getpid())
            if pid == 0:
                code = run(request["start"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            running.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
