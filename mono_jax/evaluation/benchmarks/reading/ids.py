"""What the rows of a benchmark are called: by a column that tells all of them apart, or by their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.errors import DataError
from mono_jax.evaluation.benchmarks.reading import columns
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.benchmarks.reading.rows import Row


class Ids:
    """The ids of a benchmark's rows."""

    def __init__(self, names: Sequence[str], rows: Iterable[Row] | None = None):
        """``names``: columns that may hold ids, the best first.

        ``rows``: all rows, of which the first column that differs from row to row is chosen: a question_id may be that
        of an image, or count within a category. None = the first column that a row has, whatever it holds.
        """
        self._names, self._chosen = names, names if rows is None else _telling_apart(rows, names)
        self._numbered: set[Any] = set()

    def of(self, row: Row, number: int, example: Example) -> str:
        """The id of the row, which is read as ``example``: ``number`` if no column is chosen.

        Raises DataError for a row that says the same as an earlier one, under the same id.
        """
        if (found := columns.cell(row, self._chosen)) is not None:
            return str(found)
        if (repeated := columns.cell(row, self._names)) is not None:
            pictures = tuple(picture.same for picture in example.pictures)
            content = (str(repeated), example.turns, pictures, example.truths, example.category)
            if content in self._numbered:
                raise DataError(f"{row.place}: id {str(repeated)!r} occurs twice with the same question: remove one")
            self._numbered.add(content)
        return str(number)


def _telling_apart(rows: Iterable[Row], names: Sequence[str]) -> Sequence[str]:
    """The first of ``names`` that every row has with another value; () if there is none."""
    seen: dict[str, set[str]] = {name: set() for name in names}
    for row in rows:
        for name, values in list(seen.items()):
            value = str(row.values.get(name, ""))
            if not value or value in values:
                del seen[name]
            values.add(value)
        if not seen:
            break
    return tuple(seen)[:1]
