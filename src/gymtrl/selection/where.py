"""The user's own condition: one SQL expression over the columns of the rollout table, and nothing else of SQL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import polars as pl

from gymtrl.errors import UserError
from gymtrl.workspace.settings import nearest

EXAMPLE = "for example --where \"turns <= 15 and not truncated and agent = 'x'\""

_QUOTED = re.compile(r"""(?<!\w)'[^'\\]*'|"[^"'\\]*\"""")
_ODD = re.compile(r"""['"`$#;\\]|--|/\*""")
_DISTINCT = re.compile(r"\bis\s+(not\s+)?distinct\s+from\b", re.IGNORECASE)
_QUERY = re.compile(r"\b(select|from|table|values|with)\b", re.IGNORECASE)


def parse_where(condition: str, columns: Sequence[str], *, prefix: str | None = None) -> pl.Expr:
    """Reads a condition.

    Args:
        condition (`str`): A boolean SQL expression. Subqueries, and with them every function that opens a file, are
            refused before anything is parsed.
        columns (`Sequence[str]`): Columns that there are.
        prefix (`str`, *optional*): Columns that begin with it may be there; nobody has looked yet.

    Raises:
        `UserError`: If it is no expression, or names an unknown column.
    """
    _refuse_queries(condition)
    with _explained(condition):
        expression = pl.sql_expr(condition)
        used = expression.meta.root_names()
    for name in used:
        if name not in columns and not (prefix and name.startswith(prefix)):
            raise UserError(
                f"--where {condition!r}: the table has no column {name!r}{nearest(name, columns)}",
                remedy=f"columns: {', '.join(columns)}; {EXAMPLE}",
            )
    return expression


def where_holds(rows: pl.LazyFrame, condition: str) -> pl.Series:
    """Evaluates a condition on the rollout table.

    Returns:
        `pl.Series`: For each row whether it holds; null counts as false.

    Raises:
        `UserError`: As `parse_where`, and if it cannot be evaluated or is not boolean.
    """
    expression = parse_where(condition, rows.collect_schema().names())
    with _explained(condition):
        found = rows.with_columns(expression.alias("holds")).select("holds").collect().to_series()
    if found.dtype != pl.Boolean:
        raise UserError(f"--where {condition!r} is not true or false but {found.dtype}", remedy=EXAMPLE)
    return found.fill_null(False)


@contextmanager
def _explained(condition: str) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--where {condition!r}: {first}", remedy=EXAMPLE) from None


def _refuse_queries(condition: str) -> None:
    """Quoted text may say anything; what is left must hold no sign of a query, a comment or another kind of quote."""
    bare = _QUOTED.sub(" ", condition)
    if _DISTINCT.search(bare):
        # Polars parses so, and "a is distinct from 1 and b" would quietly mean something else.
        raise UserError(
            f"--where {condition!r}: 'is distinct from' takes all that follows for its right side, 'and' included",
            remedy=f"write (a <> 'x' or a is null), or (a is not null and a = 'x') for its opposite; {EXAMPLE}",
        )
    found = _ODD.search(bare) or _QUERY.search(bare)
    if found:
        raise UserError(
            f"--where {condition!r}: {found.group()!r} has no place in it: it takes one expression over columns, "
            "no query and no comment",
            remedy=EXAMPLE,
        )
