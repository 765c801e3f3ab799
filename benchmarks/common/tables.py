"""Tables: CSV files, and tables for a terminal."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from rich.console import Console
from rich.table import Table

from lbgm_compress._util.files import atomic_write

__all__ = ["console", "make_table", "read_csv", "read_rows", "write_csv"]

Row = TypeVar("Row", bound=NamedTuple)


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file with one line of column names, atomically.

    A path that is no regular file, such as ``/dev/stdout``, is written in place.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    if file.exists() and not file.is_file():
        file.write_text(text.getvalue())
    else:
        atomic_write(file, text.getvalue().encode())


def read_csv(file: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Return the rows of a CSV file by column name; no rows if there is no such file.

    Raises
    ------
    ValueError
        If the columns are not `columns`, where these are given.
    """
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if columns is not None and tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{file} was not written by this program: name another folder (--out)")
        return list(reader)


def read_rows(file: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a CSV file whose columns are the fields of `kind`: str, int, float, bool.

    Raises
    ------
    ValueError
        If the columns are others.
    """
    types = get_type_hints(kind)
    convert = {name: "True".__eq__ if of is bool else of for name, of in types.items()}
    return [
        kind(**{name: convert[name](value) for name, value in row.items()})
        for row in read_csv(file, kind._fields)
    ]


def console(width: int = 140) -> Console:
    """Return a console for stdout; `width` is used where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else width)


def make_table(
    title: str | None,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = (),
    whole: str | None = None,
    red: Collection[int] = (),
) -> Table:
    """Return a table for a console.

    Parameters
    ----------
    title
        Its title, if any.
    headings
        The headings of the columns. The first column is aligned to the left, others to the right.
    rows
        The cells of each row.
    left
        Headings of further columns that are aligned to the left.
    whole
        Heading of a column whose cells are never wrapped.
    red
        Positions of rows that are printed in red.
    """
    table = Table(title=title)
    for position, heading in enumerate(headings):
        justify = "left" if position == 0 or heading in left else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == whole)
    for position, row in enumerate(rows):
        table.add_row(*row, style="red" if position in red else None)
    return table
