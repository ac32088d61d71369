"""What the HTML pages share: how values get into them, how their script is allowed, how they are written.

A page quotes foreign text. Three things keep it from acting in the reader's browser: jinja2 escapes every value, each
text passes `plain` first, and the page's content security policy allows no script but its own and no address but those
of `data:` images.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gymtrl.text import plain

from .rollout import facts, image_text, parts, pretty_json, shortened

_LONG_CHARS, _LONG_LINES = 1200, 24
_INLINE_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}")


def page_environment() -> Environment:
    """The templates, with the filters of those that show rollouts."""
    environment = Environment(
        loader=PackageLoader("gymtrl.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=lambda number: f"{number:,}",
        width=lambda share: f"{100 * share:.2f}%",
        figure=figure,
        facts=facts,
        parts=parts,
        pretty=pretty_json,
        image_text=image_text,
        shortened=shortened,
    )
    environment.tests.update(long=_is_long, inline_image=lambda uri: bool(_INLINE_IMAGE.fullmatch(uri)))
    return environment


def page_script(environment: Environment, name: str) -> dict[str, Markup | str]:
    """A script for a page, and the hash by which its content security policy allows it.

    Args:
        environment (`Environment`): That of the page.
        name (`str`): The script's file among the templates.
    """
    script = environment.from_string('{% include "' + name + '" %}').render()
    digest = hashlib.sha256(script.encode()).digest()
    return {"script": Markup(script), "script_hash": base64.b64encode(digest).decode()}


def write_whole(page: str, html: Path) -> None:
    """Writes a page, whole or not at all.

    Args:
        page (`str`): The document.
        html (`Path`): The file; one of that name is replaced.
    """
    draft = html.with_name(f".{html.name}.partial")
    draft.write_text(page, encoding="utf-8")
    draft.replace(html)


def figure(value: float) -> str:
    """A number in as many digits as are read."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _harmless(value: object) -> str:
    """Every value on its way into the page; `Markup` is what the templates themselves made."""
    return value if isinstance(value, Markup) else plain(str(value))


def _is_long(text: str) -> bool:
    return len(text) > _LONG_CHARS or text.count("\n") > _LONG_LINES
