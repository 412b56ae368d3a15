"""The page of the lens explorer: the report's page shell around one interactive grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pivotune.report.page import Lines, Section, asset, html, render_page

_GRID = Markup("""<div class="controls" id="choices"></div>
<p id="read" class="note"></p>
<p id="legend" class="note"></p>
<div id="grids"></div>
<p id="cell" class="note" aria-live="polite">Point at a cell, or move with the arrow keys. A click or Enter opens its ten
likeliest tokens.</p>
<dialog id="likeliest" aria-labelledby="likeliest-title"><h3 id="likeliest-title"></h3>
<div class="scroll" tabindex="0" role="region" aria-label="The likeliest tokens"></div>
<form method="dialog"><button>Close</button></form></dialog>
<noscript>The grid needs JavaScript.</noscript>""")

_HOW_TO_READ = (
    "Each column is a token that the model has read, each row a layer: 0 are the embeddings, the top row is the output.",
    "A cell shows the likeliest next token if the model stopped at this layer.",
    "Probability: of that token. Entropy: of the whole distribution, in nats. Agreement: the probability of the token "
    "that the output finds likeliest; bold where both are the same.",
    "Language: the probability of tokens of ASCII letters against tokens with other letters. It tells English from a "
    "language that is not written in Latin letters; in others many words have ASCII letters too.",
)  # fmt: skip


def explorer_page(models: Sequence[str], about: Sequence[str], items: Sequence[Any], *, served: bool = False) -> str:
    """Return the page as HTML.

    Args:
        models: names of one model, or of two whose difference is shown too.
        about: lines about lens, template and data.
        items: texts that were read (`pivotune.explore.reader.LensReader.read`).
        served: add a form for prompts, which asks the server that hands the page out.
    """
    ask = [_ask_form(models)] if served else []
    explored = {"models": list(models), "items": list(items)}
    sections = [
        Section("Lens", [*ask, _GRID, Lines(about)], {"explored": explored}),
        Section("How to read it", [Lines(_HOW_TO_READ)]),
    ]
    return render_page(
        " and ".join(models) if len(models) < 3 else "Lens explorer",
        sections,
        subtitle="What each layer would say next, read through a lens",
        styles=[asset("explore.css", __package__)],
        scripts=[asset("explore.js", __package__)],
        policy="connect-src 'self'" if served else "",
    )


def _ask_form(models: Sequence[str]) -> Markup:
    options = Markup("").join(html('<option value="{}">{}</option>', place, name) for place, name in enumerate(models))
    return html(
        '<form id="ask"><label>Prompt <textarea name="prompt" dir="auto" rows="2" required></textarea></label>'
        '<label>English parallel (optional) <textarea name="english" dir="auto" rows="2"></textarea></label>'
        '<div class="controls"><label>Answered by <select name="model">{}</select></label><button>Read</button></div>'
        '<p id="state" role="status"></p></form>',
        options,
    )
