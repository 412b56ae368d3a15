"""`pivotune data`: make and check training data."""

from __future__ import annotations

import typer

from pivotune.cli.data_check import check
from pivotune.cli.data_prepare import prepare
from pivotune.cli.data_translate import self_answers, translate

app = typer.Typer(help="Make and check training data.", no_args_is_help=True)
app.command()(prepare)
app.command()(translate)
app.command("self-answers")(self_answers)
app.command()(check)
