"""Indices: made from drafts, written, read again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_pipelines.errors import BadSample
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.indices.index_builder import Draft, ImagePart, IndexBuilder, scores_of
from data_pipelines.sources.indices.shard_index import ShardIndex


def build() -> ShardIndex:
    builder = IndexBuilder()
    bad = Draft("b")
    with bad.judged():
        raise BadSample("no_image")
    images = [ImagePart(0, 5, (3, 4)), ImagePart(5, 6, (7, 8))]
    builder.add(Draft("a", images=images, record=RawSample(caption="words"), scores={"similarity": 0.5}))
    builder.add(bad)
    builder.add(Draft("a", record=RawSample(caption="again")))
    return builder.build({"kind": "tar", "stamp": "s"})


def test_drafts_become_rows() -> None:
    index = build()
    assert (len(index), index.usable.tolist()) == (3, [0])
    assert index.dropped() == {"no_image": 1, "duplicate_key": 1}
    assert index.columns["image_size"].tolist() == [[3, 4], [7, 8]]
    assert index.columns["text_chars"].tolist() == [5, 0, 5]
    assert index.columns["similarity"][0] == 0.5 and math.isnan(index.columns["similarity"][1])


def test_bytes_and_back() -> None:
    index = build()
    copy = ShardIndex.from_bytes(index.to_bytes())
    assert copy.meta == index.meta and copy.meta["digest"] == build().meta["digest"]
    assert [copy.keys[i] for i in range(3)] == ["a", "b", "a"]
    for name, column in index.columns.items():
        np.testing.assert_array_equal(copy.columns[name], column)
    with pytest.raises(ValueError, match="not an index"):
        ShardIndex.from_bytes(index.to_bytes()[:-30])


def test_scores() -> None:
    found = scores_of({"AESTHETIC_SCORE": 5, "similarity": "0.3", "punsafe": True, "pwatermark": 0.25, "other": 1})
    assert found == {"aesthetic": 5.0, "pwatermark": 0.25}
