"""The record of the runs: their settings, machines and versions, and the commands that make them and the report again."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from pivotune.report.page import Block, Heading, Lines, Preformatted, Section, Table, Text, html, shown
from pivotune.report.runs import Material


def configuration(material: Material) -> Section | None:
    """Return a table of the keys whose values differ, without the runs' own folders."""
    runs = [run for run in material.runs if run.config]
    if not runs:
        return None
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "output_dir")
    texts = {key: ["none" if run.config.get(key) is None else str(run.config[key]) for run in runs] for key in keys}
    differing = [[key, *values] for key, values in texts.items() if len(set(values)) > 1]
    blocks: list[Block] = []
    if len(runs) == 1:
        blocks.append(Text("One run: nothing to compare its settings with."))
    elif differing:
        caption = f"{len(differing)} of {len(keys)} settings differ."
        blocks.append(Table(["setting", *(run.name for run in runs)], differing, caption))
    else:
        blocks.append(Text("The runs have the same settings."))
    for run in runs:
        settings = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        details = "<details><summary dir='auto'>All settings of {}</summary><pre class='scroll'>{}</pre></details>"
        blocks.append(html(details, run.name, shown(settings)))
    return Section("Configuration", blocks)


def environment(material: Material) -> Section | None:
    """Return a table of machines and library versions, a column for each run."""
    runs = [run for run in material.runs if run.environment]
    if not runs:
        return None
    facts = {run.name: _facts(run.environment) for run in runs}
    keys = dict.fromkeys(key for own in facts.values() for key in own)
    rows = [[key, *(own.get(key) for own in facts.values())] for key in keys]
    table = Table(["", *facts], rows, "Machines and versions with which the runs were trained.")
    return Section("Environment", [table])


def _facts(environment: Any) -> dict[str, str]:
    plain = {key: value for key, value in environment.items() if key not in ("libraries", "command")}
    libraries = environment.get("libraries")
    every = {**plain, **(libraries if isinstance(libraries, dict) else {})}
    return {
        key.replace("_", " "): ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        for key, value in every.items()
        if value is not None
    }


def reproduction(material: Material) -> Section | None:
    """Return the commands of each run, and the conditions under which they give the same numbers."""
    same = (
        "A run's config.yaml holds every setting, with all defaults. Training it again on the same rows, versions and "
        "machine gives the same numbers; another machine or another version may round otherwise."
    )
    blocks: list[Block] = [Text(same)]
    for run in (run for run in material.runs if run.config):
        tasks = [name for name, entry in run.entries.items() if entry.get("split") and entry.get("settings")]
        commands = [f"pivotune train {_word(run.path / 'config.yaml')} --set output_dir={_word(f'{run.path}-again')}"]
        if tasks:
            limit = run.entries[tasks[0]]["settings"].get("limit")
            evaluate = f"pivotune evaluate {_word(f'{run.path}-again')} --tasks {_word(','.join(tasks))}"
            commands.append(evaluate + (f" --limit {limit}" if limit else ""))
        blocks += [Heading(run.name), Preformatted("\n".join(commands), f"Commands of {run.name}")]
        first = run.environment.get("command")
        if isinstance(first, list) and first:
            blocks.append(Text(f"It was made by: {shlex.join(map(str, first))}", "note"))
    paths = " ".join(_word(run.path) for run in material.runs)
    report = Preformatted(f"pivotune report {paths} --out report.html", "Command of this report")
    figures = "Figures for a paper: add --figures DIR for PNG, SVG and PDF of each."
    blocks += [Heading("This report"), report, Lines([figures, "The table alone: pivotune compare."])]
    return Section("How to reproduce", blocks)


def _word(text: object) -> str:
    return shlex.quote(str(text))
