"""`make faults`: does everything in the table of docs/reliability.md to real runs and says which promises are kept."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from faults.scenarios import SCENARIOS, BrokenPromiseError, Scenario
from faults.workshop import Workshop


def attempt(scenario: Scenario) -> str | None:
    """Why the promise is not kept; None where it is."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            scenario.attempt(Workshop(Path(folder)))
        except (BrokenPromiseError, AssertionError) as error:
            return str(error)
    return None


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        print(f"no such scenario: {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}", file=sys.stderr)
        return 2
    broken = 0
    for name in names or SCENARIOS:
        started = time.monotonic()
        problem = attempt(SCENARIOS[name])
        broken += problem is not None
        verdict = "kept" if problem is None else "BROKEN"
        print(f"{verdict:6}  {name:32}  {time.monotonic() - started:6.1f} s  {SCENARIOS[name].promise}", flush=True)
        if problem is not None:
            print(f"        {problem}", flush=True)
    print(f"{len(names or SCENARIOS) - broken} promises kept, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
