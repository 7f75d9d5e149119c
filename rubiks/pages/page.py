"""Renders a template into one HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rubiks.files import write_text
from rubiks.pages import charts

HERE = Path(__file__).parent


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent, such as 61.73 -> "61.7%"; a dash where it is not defined."""
    return "\N{EN DASH}" if share is None else f"{share:.{digits}f}%"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """1 -> "1 video", 1200 -> "1,200 videos"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def data_url(content: bytes, media_type: str) -> str:
    """A file's content as the address of an image, for example."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def write(path: Path, template: str, scripts: Sequence[str] = (), styles: Sequence[str] = (), **context: Any) -> None:
    """Write a page.

    Args:
        path: the HTML file.
        template: in templates/, one that extends base.html.
        scripts: JavaScript files of this folder that the page includes, in this order.
        styles: CSS files that it includes besides those of every page.
        context: what the template shows. Text is escaped; `{{ data | tojson }}` is safe in a script element.

    Raises:
        InputError: the file cannot be written.
    """
    context["styles"] = [_source(name) for name in ("style.css", "table.css", *styles)]
    context["scripts"] = [_source(name) for name in scripts]
    write_text(path, render(template, **context))


def render(template: str, **context: Any) -> str:
    """A template of templates/, filled in; text is escaped."""
    return _environment().get_template(template).render(context)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rubiks.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"percent": percent, "count": count, "commas": "{:,}".format}
    environment.globals["tick"] = charts.label
    return environment


def _source(name: str) -> Markup:
    """A style sheet or script of ours, which is not escaped."""
    return Markup((HERE / name).read_text(encoding="utf-8"))
