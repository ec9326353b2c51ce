"""MosaicML's shards (MDS) as parquet. A shard describes itself, so index.json is not needed.

A file holds a uint32 n, n + 1 uint32 offsets, a JSON object with the columns, and the samples: a uint32 length for each
column without a fixed length, then the columns' bytes; little-endian.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io import blobs
from data_pipelines.sources.conversion.parquet_writer import write_rows

_SCALARS = {f"{kind}{bits}": f"<{kind[0]}{bits // 8}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)}
_LONGEST_HEAD = 1 << 20  # bytes of the JSON object
_log = logging.getLogger(__name__)


def mds_to_parquet(path: str, out: BinaryIO) -> None:
    """Writes the samples of a shard as parquet. Columns of arrays and pickles are left out, with a warning.

    Raises a DataError that names the file and the problem.
    """
    import pyarrow as pa

    with blobs.scan_view(path) as view:
        try:
            offsets, columns = _head(view)
        except (ValueError, KeyError, struct.error) as error:
            raise DataError(f"{path}: not a valid MDS shard ({error})") from None
        kinds = {name: _kind(encoding) for name, encoding, _ in columns}
        lost = [f"{name} ({encoding})" for name, encoding, _ in columns if kinds[name] is None]
        if lost:
            _log.warning("%s: columns that are not read: %s", path, ", ".join(lost))
        schema = pa.schema([(name, kind[0]) for name, kind in kinds.items() if kind is not None])
        readers = {name: kind[1] for name, kind in kinds.items() if kind is not None}
        write_rows(out, schema, _rows(path, view, offsets, columns, readers))


def _head(view: blobs.ScanView) -> tuple[np.ndarray, list[tuple[str, str, int | None]]]:
    """(offsets of the samples, (name, encoding, fixed length) of the columns)."""
    (count,) = struct.unpack("<I", view.read(0, 4))
    start = 4 + 4 * (count + 1)
    if start > view.size:
        raise ValueError(f"{count} samples in {view.size} bytes")
    offsets = np.frombuffer(view.read(4, 4 * (count + 1)), "<u4").astype(np.int64)
    if (np.diff(offsets, prepend=start) < 0).any() or offsets[-1] > view.size or offsets[0] > start + _LONGEST_HEAD:
        raise ValueError(f"offsets up to {offsets.max()} in {view.size} bytes")
    about = json.loads(view.read(start, int(offsets[0]) - start))
    if about["format"] != "mds" or about["version"] != 2:
        raise ValueError(f"format {about['format']} {about['version']}, not mds 2")
    return offsets, list(zip(about["column_names"], about["column_encodings"], about["column_sizes"], strict=True))


def _rows(
    path: str,
    view: blobs.ScanView,
    offsets: np.ndarray,
    columns: list[tuple[str, str, int | None]],
    readers: dict[str, Callable[[bytes], Any]],
) -> Iterator[dict[str, Any]]:
    for number, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        data = view.read(first, last - first)
        try:
            variable = [name for name, _, size in columns if not size]
            lengths = dict(zip(variable, struct.unpack_from(f"<{len(variable)}I", data)))
            at, row = 4 * len(variable), {}
            for name, _, size in columns:
                length = size or lengths[name]
                if at + length > len(data):
                    raise ValueError(f"column {name} ends beyond the sample")
                if name in readers:
                    row[name] = readers[name](data[at : at + length])
                at += length
        except (ValueError, struct.error) as error:
            raise DataError(f"{path}: sample {number} is damaged ({error})") from None
        yield row


def _kind(encoding: str) -> tuple[Any, Callable[[bytes], Any]] | None:
    """(type of the column, how its bytes are read); None for a column that is not read."""
    import pyarrow as pa

    name = encoding.partition(":")[0]
    if name in ("str", "json", "str_int", "str_float", "str_decimal"):
        return pa.binary(), bytes  # as text; see ``write_rows``
    if name in ("bytes", "jpeg", "png"):
        return pa.large_binary(), bytes
    if name == "pil":
        return pa.large_binary(), _png_of
    if name in ("jpeg_array", "jpegarray"):
        return pa.list_(pa.large_binary()), _parts
    if name in ("list[jpeg]", "list[png]"):  # after a uint32 without meaning
        return pa.list_(pa.large_binary()), lambda data: _parts(data[4:])
    if name == "list[pil]":
        return pa.list_(pa.large_binary()), lambda data: [_png_of(part) for part in _parts(data[4:])]
    name = "int64" if name == "int" else name
    if name in _SCALARS:
        dtype = np.dtype(_SCALARS[name])
        return pa.from_numpy_dtype(dtype), lambda data: np.frombuffer(data, dtype)[0].item()
    return None


def _parts(data: bytes) -> list[bytes]:
    """A uint32 n, n uint32 lengths, the images."""
    (count,) = struct.unpack_from("<I", data)
    ends = np.cumsum([4 + 4 * count, *struct.unpack_from(f"<{count}I", data, 4)]).tolist()
    return [data[first:last] for first, last in itertools.pairwise(ends)]


def _png_of(data: bytes) -> bytes:
    """Raw pixels as PNG: uint32 width, height and length of the mode's name, the name, the pixels."""
    from PIL import Image

    width, height, length = struct.unpack_from("<III", data)
    mode = data[12 : 12 + length].decode()
    image = Image.frombytes(mode, (width, height), data[12 + length :])
    out = io.BytesIO()
    (image if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(
        out, "PNG", compress_level=1
    )
    return out.getvalue()
