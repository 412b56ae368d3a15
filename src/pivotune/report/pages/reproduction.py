"""The commands that make the runs and the report again."""

from __future__ import annotations

import shlex

from pivotune.report.page import Block, Heading, Lines, Preformatted, Section, Text
from pivotune.report.runs import Material


def reproduction(material: Material) -> Section | None:
    """Return the commands of each run, and the conditions under which they give the same numbers."""
    blocks: list[Block] = [
        Text(
            "A run's config.yaml holds every setting, with all defaults. Training it again on the same rows, versions and "
            "machine gives the same numbers; another machine or another version may round otherwise."
        )
    ]
    for run in (run for run in material.runs if run.config):
        tasks = [name for name, entry in run.entries.items() if entry.get("split") and entry.get("settings")]
        commands = [f"pivotune train {_word(run.path / 'config.yaml')} --set output_dir={_word(f'{run.path}-again')}"]
        if tasks:
            limit = next((run.entries[name]["settings"].get("limit") for name in tasks), None)
            commands.append(
                f"pivotune evaluate {_word(f'{run.path}-again')} --tasks {_word(','.join(tasks))}"
                + (f" --limit {limit}" if limit else "")
            )
        blocks += [Heading(run.name), Preformatted("\n".join(commands), f"Commands of {run.name}")]
        first = run.environment.get("command")
        if isinstance(first, list) and first:
            blocks.append(Text(f"It was made by: {shlex.join(map(str, first))}", "note"))
    paths = " ".join(_word(run.path) for run in material.runs)
    blocks += [
        Heading("This report"),
        Preformatted(f"pivotune report {paths} --out report.html", "Command of this report"),
    ]
    blocks.append(
        Lines(
            [
                "Figures for a paper: add --figures DIR for PNG, SVG and PDF of each.",
                "The table alone: pivotune compare.",
            ]
        )
    )
    return Section("How to reproduce", blocks)


def _word(text: object) -> str:
    return shlex.quote(str(text))
