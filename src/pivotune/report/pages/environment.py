"""Machine and versions of each run."""

from __future__ import annotations

from typing import Any

from pivotune.report.page import Section, Table
from pivotune.report.runs import Material


def environment(material: Material) -> Section | None:
    """Return a table of machines and library versions, a column for each run."""
    runs = [run for run in material.runs if run.environment]
    if not runs:
        return None
    facts = {run.name: _facts(run.environment) for run in runs}
    keys = dict.fromkeys(key for own in facts.values() for key in own)
    rows = [[key, *(own.get(key) for own in facts.values())] for key in keys]
    return Section(
        "Environment", [Table(["", *facts], rows, "Machines and versions with which the runs were trained.")]
    )


def _facts(environment: Any) -> dict[str, str]:
    plain = {key: value for key, value in environment.items() if key not in ("libraries", "command")}
    libraries = environment.get("libraries")
    every = {**plain, **(libraries if isinstance(libraries, dict) else {})}
    return {
        key.replace("_", " "): ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        for key, value in every.items()
        if value is not None
    }
