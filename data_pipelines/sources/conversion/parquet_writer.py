"""Rows as a parquet file with small row groups, which random access requires."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 64  # of a group


def write_rows(out: BinaryIO, schema: pa.Schema, rows: Iterator[Mapping[str, Any]]) -> None:
    """Writes the rows. Columns of type binary, not large_binary, become text, whether or not it is UTF-8.

    When read, text that is not UTF-8 makes a bad sample; pyarrow would reject the whole file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {field.name for field in schema if field.type == pa.binary()}
    written = pa.schema([pa.field(f.name, pa.string() if f.name in texts else f.type) for f in schema])
    with pq.ParquetWriter(out, written) as writer:
        while group := list(itertools.islice(rows, _ROWS)):
            columns = [pa.array([row.get(field.name) for row in group], field.type) for field in schema]
            columns = [c.view(pa.string()) if f.name in texts else c for f, c in zip(schema, columns)]
            writer.write_batch(pa.record_batch(columns, schema=written))
