"""Scores joined to existing shards by key, such as a model's loss on each sample: numbers for filters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io.blobs import open_file
from data_pipelines.io.digests import digest, hash64
from data_pipelines.sources import joining
from data_pipelines.sources.indices.columns import ColumnFiles, Columns, Strings
from data_pipelines.sources.indices.index_builder import score_name

_VERSION = "1"  # of the table


class Scores:
    """Scores by the hash of their key.

    Attributes:
      names: of the scores: the columns of the files in lower case, without "_score".
      digest: of names, keys and scores.
    """

    def __init__(self, columns: Columns, header: dict[str, Any]):
        self._columns = columns
        self.names: tuple[str, ...] = tuple(header["names"])
        self.digest: str = header["digest"]

    def find(self, shard: str, keys: Strings, separator: str = "/") -> dict[str, np.ndarray]:
        """float32 [n] by name: the scores of a shard's samples, NaN = none.

        A key in the files is "KEY", or "SHARD/KEY" with the ``separator`` of the samples' own keys.
        """
        hashes, rows = self._columns["hash"], np.full(len(keys), -1, np.int64)
        rows = joining.find_keys(hashes, shard, keys, rows, separator)
        result = np.full((len(rows), len(self.names)), np.nan, np.float32)
        result[rows >= 0] = self._columns["scores"][rows[rows >= 0]]
        return dict(zip(self.names, result.T))


def open_scores(patterns: str | Sequence[str]) -> Scores:
    """Opens score files (paths, URLs, globs): a "key" and numbers in each line of JSONL or row of parquet.

    Columns that are not numbers are left out; a later line for the same key replaces an earlier one.
    Raises a DataError that names the file and the problem.
    """
    return Scores(*joining.open_table(patterns, "scores", _VERSION, write_table))


def write_table(files: Sequence[str], folder: Path) -> None:
    """Writes "hash" (uint64 [n], of the keys, sorted) and "scores" (float32 [n, k]) to an empty folder.

    The header is {"digest", "names": k names}. Raises DataError, OSError.
    """
    read = [_read(file) for file in files]
    names = list(dict.fromkeys(name for _, columns in read for name in columns))
    hashes = np.concatenate([found for found, _ in read])
    nothing = [np.full(len(found), np.nan, np.float32) for found, _ in read]
    parts = [[columns.get(name, empty) for name in names] for (_, columns), empty in zip(read, nothing)]
    scores = np.concatenate([np.stack(part, axis=1) for part in parts])
    order = joining.last_of_equals(hashes)
    hashes, scores = hashes[order], scores[order]
    table = ColumnFiles(folder)
    table.append("hash", hashes)
    table.append("scores", scores)
    table.finish({"digest": digest(*names, hashes.tobytes(), scores.tobytes()), "names": names})


def _read(file: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(hashes of the keys, uint64 [n]; float32 [n] by name). Raises DataError."""
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    try:
        with open_file(file) as handle:
            if file.endswith(".parquet"):
                table = pa.parquet.read_table(handle)
            else:
                text = pa.json.ParseOptions(explicit_schema=pa.schema([("key", pa.string())]))
                table = pa.json.read_json(handle, parse_options=text)
        names = {
            score_name(field.name): field.name
            for field in table.schema
            if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        }
        names.pop("key", None)
        lacking = table["key"].null_count if "key" in table.column_names else len(table)
        if lacking or not names:
            raise DataError(
                f"{file}: {f'{lacking} rows without a key' if lacking else 'no numbers'}; score files need both, "
                f'as in {{"key": "00000/000000001", "loss": 2.5}}; its columns are {", ".join(table.column_names)}'
            )
        keys = (str(key).encode("utf-8", "surrogatepass") for key in table.column("key").to_pylist())
        hashes = np.fromiter(map(hash64, keys), np.uint64, len(table))
        numbers = {name: table.column(column).cast(pa.float32(), safe=False) for name, column in names.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable score file ({error})") from None
    return hashes, {name: column.to_numpy().astype(np.float32) for name, column in numbers.items()}
