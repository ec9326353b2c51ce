"""TFRecord files of ``tf.train.Example`` as parquet, without TensorFlow.

A record is a uint64 length, its masked CRC-32C, the bytes and their masked CRC-32C, little-endian.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipelines.errors import DataError
from data_pipelines.io import blobs
from data_pipelines.io.digests import masked_crc32c
from data_pipelines.sources.conversion.parquet_writer import write_rows

if TYPE_CHECKING:
    import pyarrow as pa

_LONGEST = 1 << 30  # bytes of a record


def tfrecord_to_parquet(path: str, out: BinaryIO) -> None:
    """Writes the examples of a file as parquet, one column per feature.

    Raises a DataError that names the file and the problem.
    """
    import pyarrow as pa

    with blobs.scan_view(path) as view:
        found: dict[str, _Feature] = {}
        for example in _examples(path, view):
            for name, feature in example.items():
                found.setdefault(name, _Feature()).see(path, name, feature)
        schema = pa.schema([(name, feature.type()) for name, feature in sorted(found.items()) if feature.kind])
        several = {name for name, feature in found.items() if feature.most > 1}
        rows = (
            {name: _value(feature, name in several) for name, feature in example.items()}
            for example in _examples(path, view)
        )
        write_rows(out, schema, rows)


@dataclasses.dataclass
class _Feature:
    """What all examples hold under a name: ``kind`` of the values, most per example, how many are texts."""

    kind: str = ""
    most: int = 0
    values: int = 0
    texts: int = 0

    def see(self, path: str, name: str, feature: Any) -> None:
        kind = feature.WhichOneof("kind") or ""
        values = getattr(feature, kind).value if kind else ()
        if not values:
            return
        if self.kind and self.kind != kind:
            raise DataError(f"{path}: feature {name!r} is {self.kind} in one record and {kind} in another")
        self.kind, self.most = kind, max(self.most, len(values))
        if kind == "bytes_list":
            self.values += len(values)
            self.texts += sum(map(_is_text, values))

    def type(self) -> pa.DataType:
        """Bytes count as text, which ``write_rows`` marks by the type binary, if most of them are valid text."""
        import pyarrow as pa

        kinds = {"float_list": pa.float32(), "int64_list": pa.int64(), "bytes_list": pa.large_binary()}
        if self.most > 1:
            return pa.list_(pa.string() if self.texts and self.texts == self.values else kinds[self.kind])
        return pa.binary() if 2 * self.texts > self.values else kinds[self.kind]


def _is_text(value: bytes) -> bool:
    try:
        return "\0" not in value.decode()
    except UnicodeDecodeError:
        return False


def _value(feature: Any, several: bool) -> Any:
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    return values if several else values[0] if values else None


def _examples(path: str, view: blobs.ScanView) -> Iterator[Any]:
    """The features of each example, by name; none for a record that is not an example, whose row is then empty."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    for number, data in enumerate(_records(path, view)):
        example = proto.SequenceExample()  # an Example is a SequenceExample without lists
        try:
            example.ParseFromString(data)
        except DecodeError:
            yield {}
            continue
        if example.feature_lists.feature_list:
            raise DataError(f"{path}: record {number} is a SequenceExample, which is not read: write Examples")
        yield example.context.feature


def _records(path: str, view: blobs.ScanView) -> Iterator[bytes]:
    at, number = 0, 0
    while at < view.size:
        head = view.read(at, 12)
        length, mark = struct.unpack("<QI", head) if len(head) == 12 else (0, -1)
        # A record's own bytes are checked when their content is read.
        if mark != masked_crc32c(head[:8]) or length > _LONGEST or at + 16 + length > view.size:
            raise DataError(f"{path}: not a valid TFRecord file (record {number} at byte {at} of {view.size})")
        yield view.read(at + 12, length)
        at, number = at + 16 + length, number + 1
