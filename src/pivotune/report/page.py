"""Render one offline HTML file from sections: no network request, and a policy that forbids all that is not in the file.

A section is a heading and blocks. Text from outside (names, prompts, answers) reaches the page in three ways, each of which
shows it as text: through Jinja's escaping, through `html`, and as packed data that `page.js` writes with `textContent`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pivotune.text.files import finite

# Characters without a shape that turn the direction of the text around them, break it or hide in it. The marks and joiners
# of Arabic, Persian and Indic texts (U+200C to U+200F, U+061C) stay: they shape letters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u180e\u200b\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
Cell: TypeAlias = str | int | float | None


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph. `kind` is a class of `page.css`: `note`, `warning`, `lead`, or none."""

    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Lines:
    """A bulleted list."""

    lines: Sequence[str]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Preformatted:
    """Text with its line ends: a command, a configuration."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table that scrolls within the page; the first cell of each row is its heading.

    Attributes:
        numeric: align all cells but the first of each row at the end.
        folded: show the caption alone until it is opened.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    numeric: bool = False
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with controls for the fields of its data that `page.js` knows (run, language, task, metric, ...).

    Attributes:
        name: id of its element, and stem of its file.
        spec: Vega-Lite specification (`chart.to_dict()`).
        caption: what the figure shows, for all readers.
        table: its figures, for readers who do not see it.
    """

    name: str
    spec: Mapping[str, Any]
    caption: str
    table: Table | None = None

    @property
    def title(self) -> str:
        """Return the chart's own title, which the page shows as text and not in the drawing."""
        title = self.spec.get("title") or self.name
        return str(title["text"]) if isinstance(title, Mapping) else str(title)


Block: TypeAlias = Text | Lines | Heading | Preformatted | Table | Figure | Markup


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading, and an entry in its contents.

    Attributes:
        data: JSON values by element id, for scripts: `await pivotune.data(id)`.
    """

    title: str
    blocks: Sequence[Block]
    data: Mapping[str, Any] = field(default_factory=dict)


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    policy: str = "",
) -> str:
    """Return the page as HTML.

    Args:
        styles, scripts: CSS and JavaScript of a page's own, after those of every page.
        policy: more directives of the content security policy, `connect-src 'self'` for a page that a server hands out.
    """
    drawn = any(isinstance(block, Figure) for section in sections for block in section.blocks)
    # A page without charts is 900 kB smaller.
    all_scripts = [*([_vega_script()] if drawn else []), asset("page.js"), *scripts]
    all_styles = [asset("page.css"), *styles]
    directives = (
        "default-src 'none'",
        f"script-src {' '.join(map(_digest, all_scripts))}",
        f"style-src {' '.join(map(_digest, all_styles))}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        *([policy] if policy else []),
    )
    return _template().render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        policy="; ".join(directives),
        styles=[Markup(style) for style in all_styles],
        scripts=[Markup(script) for script in all_scripts],
    )


def html(template: str, *values: object) -> Markup:
    """Return a template of HTML with its `{}` filled with escaped values."""
    return Markup(template).format(*(shown(value) if isinstance(value, str) else value for value in values))


def shown(text: str) -> str:
    """Return text with each invisible character as its code, `⟨U+202E⟩`; marked-up text as it is."""
    if isinstance(text, Markup):
        return text
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text.replace("\r\n", "\n"))


def excerpt(text: Any, longest: int) -> str:
    """Return the first `longest` characters of a value, with the number of all; '' for None."""
    text = "" if text is None else str(text)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def packed(value: Any) -> Markup:
    """Return a JSON value, its text as by `shown`, compressed and in letters that no HTML parser reads as HTML."""
    text = json.dumps(finite(_shown_within(value)), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Without the time of the compression: the same runs give the same page.
    return Markup(base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode("ascii"))


def _shown_within(value: Any) -> Any:
    if isinstance(value, str):
        return shown(str(value))
    if isinstance(value, Mapping):
        return {shown(str(key)): _shown_within(item) for key, item in value.items()}
    return [_shown_within(item) for item in value] if isinstance(value, Iterable) else value


def _digest(content: str) -> str:
    """Return the source expression of the policy that allows this very content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode('ascii')}'"


@cache
def asset(name: str, package: str = "pivotune.report") -> str:
    """Return the text of a file in a package."""
    return (resources.files(package) / name).read_text(encoding="utf-8")


@cache
def _vega_script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed in one script, whose expressions are interpreted (`ast`), not compiled."""
    import vl_convert

    # The parser ends a script at these letters, wherever they stand in it.
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", r"<\/script").replace("<!--", r"<\!--")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pivotune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: shown(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["packed"] = packed
    environment.filters["anchor"] = anchor
    environment.tests["a"] = lambda block, name: type(block).__name__ == name
    return environment.get_template("page.html.jinja")


def anchor(title: str) -> str:
    """Return the id of a section: `Sample answers` -> `sample-answers`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
