"""Which samples are offered, and how often."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.sources.indices.index_builder import Draft, ImagePart, IndexBuilder
from data_pipelines.sources.selection.filters import Filters
from data_pipelines.sources.selection.select import Joined, Selection, repeat, select, unique
from data_pipelines.sources.selection.share import Share


def index_of(*drafts: Draft):
    builder = IndexBuilder()
    for draft in drafts:
        builder.add(draft)
    return builder.build({"kind": "tar", "stamp": ""})


@pytest.mark.parametrize(
    ("times", "rows"), [(1, [4, 5, 7, 9]), (2, [4, 5, 7, 9] * 2), (1.5, [4, 5, 7, 9, 4, 7]), (0.25, [4]), (0.1, [])]
)
def test_repeats(times: float, rows: list[int]) -> None:
    selection = Selection(index_of(), np.array([4, 5, 7, 9]))
    assert repeat(selection, Share(times)).rows.tolist() == rows


def test_only_usable_samples_that_pass_are_offered() -> None:
    part = ImagePart(0, 1, (30, 40))
    index = index_of(
        Draft("a", images=[part]), Draft("b", reason="no_image"), Draft("c", images=[ImagePart(1, 1, (20, 40))])
    )
    filters = Filters({"min_size": 30})
    selection, text_hash, lost = select(index, "shard", filters, Joined())
    assert (selection.rows.tolist(), len(text_hash), lost) == ([0], 1, {"no_image": 1})
    assert filters.dropped == {"too_small": 1}


def test_the_first_of_equal_images_is_kept_across_shards() -> None:
    def shard(*hashes: int):
        parts = [ImagePart(0, 1, (30, 40))]
        return index_of(*(Draft(f"k{i}", images=parts, image_hash=value) for i, value in enumerate(hashes)))

    filters = Filters({"unique_images": True})
    masks = unique([shard(1, 2, 1), shard(3, 2, 0, 0)], ["a", "b"], filters, Joined())
    assert [mask.tolist() for mask in masks] == [[True, True, False], [True, False, True, True]]
    assert filters.dropped == {"duplicate_image": 2}
