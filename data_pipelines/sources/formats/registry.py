"""The table of all storage formats."""

from __future__ import annotations

from data_pipelines.sources.formats.array_record import ArrayRecordFormat
from data_pipelines.sources.formats.files import FilesFormat
from data_pipelines.sources.formats.format import Format
from data_pipelines.sources.formats.jsonl import JsonlFormat
from data_pipelines.sources.formats.parquet import ParquetFormat
from data_pipelines.sources.formats.tar import TarFormat
from data_pipelines.sources.formats.text import TextFormat
from data_pipelines.sources.formats.tfds import TfdsFormat

_ALL: tuple[Format, ...] = (
    TarFormat(),
    FilesFormat(),
    ParquetFormat(),
    JsonlFormat(),
    ArrayRecordFormat(),
    TfdsFormat(),
    TextFormat(),
)
FORMATS: dict[str, Format] = {each.kind: each for each in _ALL}  # by the name in the spec of a source
