"""Plain text files, cut into pieces at paragraph, line or word borders (language-model runs, retention checks)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records.text_record import Form, parse
from data_pipelines.sources.indexed import IndexedSource
from data_pipelines.sources.shard_index import IndexBuilder, ShardIndex

CHUNK_BYTES = 2048
_BLANK = bytes(range(33))  # spaces and control characters


def scan(path: str, meta: Mapping[str, Any], chunk_bytes: int = CHUNK_BYTES) -> ShardIndex:
    """Cuts a UTF-8 file into pieces of at most ``chunk_bytes`` bytes; sample FILE:N is its Nth piece, counted from 1.

    A piece ends behind the last blank line in its second half, otherwise the last newline, otherwise the last space.
    """
    if not isinstance(chunk_bytes, int) or chunk_bytes < 16:
        raise DataError(f"{path}: chunk_bytes must be an integer of at least 16, is {chunk_bytes!r}")
    builder = IndexBuilder()
    with storage.scan_view(path) as view:
        position, number = 0, 0
        while position < view.size:
            data = view.read(position, chunk_bytes)
            if position + len(data) < view.size:
                data = data[: _cut(data)]
            if data.strip(_BLANK):  # white space between pieces is no sample
                number += 1
                record, reason = None, None
                try:
                    record = parse(Form.TEXT, data)
                except BadSample as error:
                    reason = error.reason
                builder.add(str(number), text=(position, len(data), Form.TEXT), record=record, reason=reason)
            position += len(data)
    return builder.build(meta)


class Source(IndexedSource):
    """Pieces of plain text files. Keys are FILE:PIECE."""

    key_separator = ":"


def _cut(data: bytes) -> int:
    """Length of the first piece of ``data``."""
    half = len(data) // 2
    for border in (b"\n\n", b"\n", b" "):
        found = data.rfind(border, half)
        if found >= 0:
            return found + len(border)
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:  # no border at all: at least never inside a character
        end -= 1
    lead = data[end - 1]
    width = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    return len(data) if end - 1 + width <= len(data) else end - 1
