"""MDS shards and TFRecord files: those in ``cases`` were written by mosaicml-streaming 0.13.0 and tfrecord 1.14.6."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.sources.finding import shards_of
from data_pipelines.sources.source import Source, open_source
from tests.data_pipelines.shard_tools import encoded

CASES = Path(__file__).parents[1] / "cases"
PAIRS, TALKS, PIXELS = (CASES / "mds" / f"{name}.mds" for name in ("pairs", "talks", "pixels"))
RECORDS = CASES / "tfrecord" / "flickr.tfrecord-00000-of-00001"
CAPTIONS = [f"caption {n} é" for n in range(3)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def opened(path: Path, **spec: object) -> Source:
    (shard,) = shards_of([str(path)], None, {})
    assert shard.kind == "parquet"
    return open_source({"kind": "parquet", "paths": str(path), **spec})


def pixels(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode)).astype(int)


def picture(number: int, mode: str = "RGB") -> np.ndarray:
    return pixels(encoded(40 + number, 30, seed=number), mode)


def test_mds_pairs() -> None:
    source = opened(PAIRS)
    samples = [source.read(number) for number in range(len(source))]
    assert [sample.caption for sample in samples] == CAPTIONS
    # Compressed a second time when they were written.
    assert all(np.abs(pixels(*sample.images) - picture(n)).mean() < 12 for n, sample in enumerate(samples))
    assert len(opened(PAIRS, filters={"min_aesthetic": 5})) == 2


def test_mds_talks_and_pixels() -> None:
    source = opened(TALKS)
    for number in range(3):
        sample = source.read(number)
        assert sample.conversations[1] == ("gpt", f"noise {number}")
        assert [pixels(image).tolist() for image in sample.images] == [picture(n).tolist() for n in range(number + 1)]
    source = opened(PIXELS)
    for number in range(2):
        sample = source.read(number)
        assert sample.caption == f"t{number}"
        np.testing.assert_array_equal(pixels(*sample.images, mode="L"), picture(number, "L"))


def test_tfrecord() -> None:
    source = opened(RECORDS)
    samples = [source.read(number) for number in range(len(source))]
    assert [(s.caption, s.images) for s in samples] == [
        (caption, (encoded(40 + number, 30, seed=number),)) for number, caption in enumerate(CAPTIONS)
    ]
    assert len(opened(RECORDS, filters={"min_aesthetic": 5})) == 2


@pytest.mark.parametrize("path", [PAIRS, TALKS, RECORDS], ids=lambda path: path.name)
def test_cut_files_are_named(path: Path, tmp_path: Path) -> None:
    """Wherever a file ends too early, it is that file that is named: no sample is lost in silence."""
    data = path.read_bytes()
    for cut in [*range(40), *range(40, len(data), 997), len(data) - 1]:
        damaged = tmp_path / f"{cut}.{path.name}"
        damaged.write_bytes(data[:cut])
        with pytest.raises(DataError, match=f"{damaged.name}: "):
            opened(damaged)


@pytest.mark.parametrize("path", [PAIRS, TALKS, RECORDS], ids=lambda path: path.name)
def test_damaged_bytes(path: Path, tmp_path: Path) -> None:
    """Bytes that were overwritten make a DataError, or three samples of which each is good or has a reason."""
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for number in range(40):
        place = int(rng.integers(0, 300 if number % 2 else len(data) - 8))
        damaged = tmp_path / f"{number}.{path.name}"
        damaged.write_bytes(data[:place] + rng.bytes(8) + data[place + 8 :])
        try:
            source = opened(damaged)
        except DataError:
            continue
        assert len(source) + sum(source.dropped().values()) == 3


def test_latin1_text_is_one_bad_sample(tmp_path: Path) -> None:
    data = PIXELS.read_bytes()
    damaged = tmp_path / "a.mds"
    damaged.write_bytes(data[:-1] + b"\xe9")  # the last letter of the last text
    source = opened(damaged)
    assert (len(source), source.dropped()) == (1, {"caption_not_utf8": 1})


def test_sequence_examples_are_named(tmp_path: Path) -> None:
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    example = proto.SequenceExample()
    example.feature_lists.feature_list["frames"].feature.add().bytes_list.value.append(b"x")
    record, first = example.SerializeToString(), RECORDS.read_bytes()
    (length,) = struct.unpack_from("<Q", first)
    with pytest.raises(DataError, match="record 0 is a SequenceExample"):
        written = tmp_path / "a.tfrecord"
        # A record of the same length as one in the file has the same checksum of its length.
        written.write_bytes(first[:12] + record + _filler(length - len(record)) + bytes(4))
        opened(written)


def _filler(length: int) -> bytes:
    """An unknown field of protobuf, of ``length`` bytes."""
    body = length - 4
    return bytes([0x7A, 0x80 | body & 0x7F, 0x80 | body >> 7 & 0x7F, body >> 14]) + bytes(body)
