"""Shards in formats without random access (compressed, CSV, one JSON object, Arrow), converted once."""

from __future__ import annotations

import logging
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.errors import DataError
from data_pipelines.io import blobs, paths, publish
from data_pipelines.io.digests import digest
from data_pipelines.io.processes import locked
from data_pipelines.io.storage import storage
from data_pipelines.sources.conversion import json_shapes, tables
from data_pipelines.sources.conversion.mds import mds_to_parquet
from data_pipelines.sources.conversion.tfrecord import tfrecord_to_parquet

_VERSION = "2"  # of the output of conversions
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_SUFFIXES = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lz4": "lz4",
    ".tgz": "gzip",
    ".txz": "xz",
}
# First bytes of files that are not shards, whatever their name.
_FOREIGN = {
    b"PK\3\4": "a zip archive: unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x89HDF": "an HDF5 file, which is not read",
    b"SQLite format 3": "an SQLite database, which is not read",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file: run 'git lfs pull'",
    b"<!DOCTYPE": "a page of the web: the download failed",
    b"<!doctype": "a page of the web: the download failed",
    b"<html": "a page of the web: the download failed",
    b"<?xml": "an XML file, perhaps an error response from a store: the download failed",
}
_LONGEST_MAGIC = max(map(len, (*_MAGIC, *_FOREIGN)))
_CHUNK = 1 << 22
_TO_PARQUET: dict[str, Callable[[str, BinaryIO], None]] = {
    ".arrow": tables.arrow_to_parquet,
    ".feather": tables.arrow_to_parquet,
    ".mds": mds_to_parquet,
    ".tfrecord": tfrecord_to_parquet,
    ".tfrecords": tfrecord_to_parquet,
}
_log = logging.getLogger(__name__)


def plain_name(path: str) -> str:
    """The name of a file without its compression suffix: "a.jsonl" for "a.jsonl.gz", "a.tar" for "a.tgz"."""
    name = paths.basename(path)
    suffix = next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] + (".tar" if suffix in (".tgz", ".txz") else "")


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, without a shard number: ".tfrecord" for "a.tfrecord-00-of-16"."""
    name = re.sub(r"-\d+-of-\d+$", "", name.lower())
    return name[name.rfind(".") :] if "." in name else ""


def converted(path: str, kind: str) -> str:
    """``path``, or the file in the cache folder to which a shard of ``kind`` was converted.

    Raises a DataError that names the file and the problem; StorageError.
    """
    if paths.is_dir(path):
        return path
    name, compression = plain_name(path), _compression(path)
    if compression is not None:
        path = _made(path, name, lambda out: _unpack(path, compression, out))
    if kind == "jsonl" and name.lower().endswith((".csv", ".tsv")):
        return _made(path, f"{name}.jsonl", lambda out: tables.csv_lines(path, out))
    if kind == "jsonl" and (records := json_shapes.records_of(path)) is not None:
        return _made(path, name, lambda out: _write_lines(records, out))
    write = _TO_PARQUET.get(suffix_of(name)) if kind == "parquet" else None
    return path if write is None else _made(path, name, lambda out: write(path, out))


def _compression(path: str) -> str | None:
    """A file's compression: by the first bytes of a local file, by the name of a remote one."""
    if paths.is_remote(path):
        return next((codec for suffix, codec in _SUFFIXES.items() if path.lower().endswith(suffix)), None)
    start = blobs.Blob(path).read(0, _LONGEST_MAGIC)
    if what := next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), ""):
        raise DataError(f"{path}: {what}")
    return next((codec for magic, codec in _MAGIC.items() if start.startswith(magic)), None)


def _made(path: str, name: str, write: Callable[[BinaryIO], None]) -> str:
    """Path of the conversion of ``path``, which is made if it does not exist yet."""
    identity = digest(_VERSION, path if paths.is_remote(path) else paths.local_path(path), paths.stamp(path))[:16]
    place = paths.cache_dir() / "converted" / identity / name
    with storage(str(place), "free some space, or set MONO_JAX_CACHE"):
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.with_name(f"{name}.lock")):  # one process at a time
            if not place.exists():
                _log.warning("%s: has no random access; converted once to %s", path, place)
                _write(place, write)
    return str(place)


def _write(place: Path, write: Callable[[BinaryIO], None]) -> None:
    with publish.new_file(place) as new, new.open("wb") as out:
        write(out)


def _plain(file: blobs.PatientFile, codec: str) -> Any:
    """A file object with the decompressed content of a file."""
    import pyarrow as pa

    return lzma.LZMAFile(file) if codec == "xz" else pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)


def _unpack(path: str, codec: str, out: BinaryIO) -> None:
    import pyarrow as pa

    with blobs.open_file(path) as file:
        try:
            with _plain(file, codec) as stream:
                while chunk := stream.read(_CHUNK):
                    out.write(chunk)
        except (pa.ArrowException, lzma.LZMAError, OSError, EOFError) as error:
            raise DataError(f"{path}: not a valid {codec} file ({' '.join(str(error).split())})") from None


def _write_lines(records: Iterator[Any], out: BinaryIO) -> None:
    for record in records:
        out.write(json_shapes.line_of(record))
