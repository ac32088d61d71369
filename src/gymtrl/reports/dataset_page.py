"""Rows of a dataset as one HTML page that needs nothing else and runs no script.

The rows are foreign text: jinja2 escapes every value, each text passes `plain` first, and the page's content security
policy allows no script and no address at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gymtrl.errors import UserError
from gymtrl.formats.painted import PaintedRow
from gymtrl.formats.totals import Totals, dataset_totals
from gymtrl.rollouts.outputs import check_output

from .dataset import counted
from .page import page_environment, write_whole

_FOLDED_TOKENS = 1500
_OWN_FILES = ("data/*.parquet", "dropped.parquet", "train_with_trl.py", "README.md", "manifest.json")


def write_page(dataset: Path, rows: Iterable[PaintedRow], html: Path) -> None:
    """Writes the page of a dataset, whole or not at all.

    Args:
        dataset (`Path`): Dataset folder; all of it is counted.
        rows (`Iterable[PaintedRow]`): Rows of it to show, as `painted_rows` gives them.
        html (`Path`): The page to write; one of that name is replaced.

    Raises:
        `UserError`: If the folder is no dataset, if the page cannot be written, or if it would overwrite a file of the
            dataset; and what reading the rows raises.
    """
    check_output(html, [])
    if html.exists() and any(html.samefile(path) for pattern in _OWN_FILES for path in dataset.glob(pattern)):
        raise UserError(f"{html} would be overwritten: it belongs to the dataset", remedy="name another file")
    page = dataset_page(dataset_totals(dataset), list(rows), title=dataset.resolve().name)
    write_whole(page, html)


def dataset_page(totals: Totals, rows: list[PaintedRow], *, title: str) -> str:
    """Renders a dataset and some of its rows.

    Args:
        totals (`Totals`): What the dataset holds in all.
        rows (`list[PaintedRow]`): The rows that the reader can look into.
        title (`str`): The page's heading.

    Returns:
        `str`: A whole HTML document without any reference to another one.
    """
    environment = page_environment()
    environment.filters.update(
        percent=lambda share: f"{share:.1%}",
        ids=lambda piece: ", ".join(map(str, piece.ids[:8])) + (", …" if len(piece.ids) > 8 else ""),
        words=counted,
    )
    return environment.get_template("dataset.html.j2").render(
        totals=totals,
        rows=rows,
        title=title,
        failed=[row for row in rows if not row.passed],
        folded=_FOLDED_TOKENS,
    )
