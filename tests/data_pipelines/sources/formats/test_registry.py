"""What all formats have in common."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from data_pipelines.sources.formats.registry import FORMATS


def test_formats_are_complete() -> None:
    assert list(FORMATS) == ["tar", "files", "parquet", "jsonl", "array_record", "tfds", "text"]
    suffixes = [suffix for each in FORMATS.values() for suffix in each.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    for each in FORMATS.values():
        assert each.options().given() == {}
        assert each.key_separator in ("/", ":")
        assert all(field.default in (None, False) for field in dataclasses.fields(each.options))


def test_libraries_of_formats_are_imported_when_they_are_needed() -> None:
    heavy = "{'jax', 'pyarrow', 'array_record', 'tensorflow_datasets', 'grain', 'PIL', 'fsspec'}"
    code = f"import sys, data_pipelines.sources.formats.registry; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
