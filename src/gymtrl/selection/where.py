"""The user's own condition: one SQL expression over the columns of the rollout table, and nothing else of SQL."""

from __future__ import annotations

import re
from collections.abc import Sequence

import polars as pl

from gymtrl.errors import UserError
from gymtrl.workspace.settings import nearest

EXAMPLE = "for example --where \"turns <= 15 and not truncated and agent = 'x'\""

_QUOTED = re.compile(r"""(?<!\w)'[^'\\]*'|"[^"'\\]*\"""")
_ODD = re.compile(r"""['"`$#;\\]|--|/\*""")
_QUERY = re.compile(r"\b(select|from|table|values|with)\b", re.IGNORECASE)


def where_holds(rows: pl.LazyFrame, condition: str) -> pl.Series:
    """Evaluates a condition.

    Args:
        rows (`pl.LazyFrame`): The rollout table.
        condition (`str`): A boolean SQL expression. Subqueries, and with them every function that opens a file, are
            refused before anything is parsed.

    Returns:
        `pl.Series`: For each row whether it holds; null counts as false.

    Raises:
        `UserError`: If it is no expression, names an unknown column, or is not boolean.
    """
    _refuse_queries(condition)
    try:
        expression = pl.sql_expr(condition)
        columns = rows.collect_schema().names()
        _known_columns(condition, expression.meta.root_names(), columns)
        found = rows.with_columns(expression.alias("holds")).select("holds").collect().to_series()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--where {condition!r}: {first}", remedy=EXAMPLE) from None
    if found.dtype != pl.Boolean:
        raise UserError(f"--where {condition!r} is not true or false but {found.dtype}", remedy=EXAMPLE)
    return found.fill_null(False)


def _refuse_queries(condition: str) -> None:
    """Quoted text may say anything; what is left must hold no sign of a query, a comment or another kind of quote."""
    bare = _QUOTED.sub(" ", condition)
    found = _ODD.search(bare) or _QUERY.search(bare)
    if found:
        raise UserError(
            f"--where {condition!r}: {found.group()!r} has no place in it: it takes one expression over columns, "
            "no query and no comment",
            remedy=EXAMPLE,
        )


def _known_columns(condition: str, used: Sequence[str], columns: Sequence[str]) -> None:
    for name in used:
        if name not in columns:
            raise UserError(
                f"--where {condition!r}: the table has no column {name!r}{nearest(name, columns)}",
                remedy=f"columns: {', '.join(columns)}; {EXAMPLE}",
            )
