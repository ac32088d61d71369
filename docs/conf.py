"""The site: Markdown by MyST, the Python reference from docstrings. Built by `make docs`."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, get_type_hints

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import MockFinder, _MockObject
from sphinx.util.typing import stringify_annotation

from gymtrl import __version__

project = "gymtrl"
release = __version__
html_title = f"gymtrl {__version__}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False
exclude_patterns = ["_build"]

extensions = ["myst_parser", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
# Slugs of headings are those of GitHub, so that `page.md#heading` leads somewhere in both.
myst_heading_anchors = 4
# `--flag` must not become a dash and a word.
smartquotes = False

# A dead link between pages is a warning, and warnings are errors; docstrings also name what other libraries have.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]
default_role = "py:obj"

# What only a run needs is stood in for, so that the site is the same whether it is installed or not. Of one function
# in it the code asks for the parameters.
_MockObject.__signature__ = inspect.Signature()
_NOT_NEEDED = "accelerate datasets peft PIL pyarrow scipy starlette torch transformers trl uvicorn"
sys.meta_path.insert(0, MockFinder(_NOT_NEEDED.split()))
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
napoleon_custom_sections = [("Attributes", "params_style")]


def setup(app: Sphinx) -> None:
    """Settings are told by their fields; what is after a name and its type follows a dash."""
    app.connect("autodoc-process-signature", _without_signature)
    app.connect("autodoc-process-docstring", _with_fields)
    app.connect("doctree-resolved", _with_dashes)


def _without_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    return ("(**fields)", "") if _is_settings(thing) else None


def _with_fields(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if not _is_settings(thing):
        return
    types = get_type_hints(thing)
    for field_name, field in thing.model_fields.items():
        default = field.get_default(call_default_factory=True)
        told = "*optional*" if default is None else f"defaults to ``{default!r}``"
        told = "required" if field.is_required() else told
        kind = re.sub(r"\b(pathlib|typing)\.", "", stringify_annotation(types[field_name])).removesuffix(" | None")
        lines += [f":param {field_name}: {_plain(field.description or '')}", f":type {field_name}: ``{kind}``, {told}"]


def _with_dashes(app: Sphinx, tree: nodes.document, page: str) -> None:
    for text in list(tree.findall(nodes.Text)):
        if " -- " in text and not isinstance(text.parent, nodes.literal | nodes.literal_block):
            text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ")))


def _is_settings(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseModel)


def _plain(text: str) -> str:
    """Text that reStructuredText shows as it is."""
    return re.sub(r"([\\`*_|])", r"\\\1", text)
