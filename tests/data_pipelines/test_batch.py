import numpy as np
import pytest

from data_pipelines.batch import DEFAULT_GEOMETRY, BatchSpec, TileGeometry, boundaries, ragged
from data_pipelines.errors import DataError

SPEC = BatchSpec(visual_tokens=8, text_tokens=4, token_pixels=2)


def test_a_tile_is_whole_tokens():
    assert TileGeometry(448, 28, "v2") == DEFAULT_GEOMETRY and DEFAULT_GEOMETRY.tokens_per_tile == 256
    for values, message in (
        ((57, 28), "not a multiple"),
        ((56, 0), "not a multiple"),
        ((56, 28, "v3"), "'v1' or 'v2'"),
    ):
        with pytest.raises(DataError, match=message):
            TileGeometry(*values)


def test_an_empty_batch_fits_its_spec():
    batch = SPEC.empty(3)
    SPEC.check(batch)
    assert batch["order"].tolist() == [list(range(12))] * 3 and not batch["segments"].any()
    assert boundaries(batch).tolist() == [8, 8, 8]
    own = np.ones((3, 8, 2, 2, 3), np.uint8)
    assert SPEC.empty(3, own)["patches"] is own


def test_misfits_are_named():
    batch = SPEC.empty(1)
    with pytest.raises(ValueError, match=r"missing or unknown: \['tokens'\]"):
        SPEC.check({name: array for name, array in batch.items() if name != "tokens"})
    with pytest.raises(ValueError, match=r"batch\['tokens'\] is int64"):
        SPEC.check(batch | {"tokens": batch["tokens"].astype(np.int64)})


def test_ragged_boundaries_keep_what_is_read():
    batch = SPEC.empty(2)
    batch["order"][0, :5] = [0, 1, 2, 8, 9]  # three visual tokens, two of text
    batch["order"][0, 5:] = [3, 4, 5, 6, 7, 10, 11]
    batch["order"][1, :2] = [8, 9]
    batch["order"][1, 2:] = [*range(8), 10, 11]
    batch["segments"][0, :5], batch["segments"][1, :2] = 1, 1
    packed = ragged(batch, 8, 4)
    BatchSpec(8, 4, 2, boundary_block=4).check(packed)
    assert boundaries(packed).tolist() == packed["visual_slots"].tolist() == [4, 0]
    assert packed["order"][:, :5].tolist() == [[0, 1, 2, 4, 5], [0, 1, 2, 3, 4]]
    assert all(sorted(order) == list(range(8)) for order in packed["order"].tolist())
    with pytest.raises(ValueError, match="needs 6 slots"):
        ragged(batch, 4, 4)
    with pytest.raises(ValueError, match="multiple of block"):
        ragged(batch, 6, 4)


def filled(visual: int, text: int) -> dict[str, np.ndarray]:
    """One row of ``SPEC`` with so many visual tokens, then so many of text."""
    batch = SPEC.empty(1)
    unused = [*range(visual, 8), *range(8 + text, 12)]
    batch["order"][0] = [*range(visual), *range(8, 8 + text), *unused]
    batch["segments"][0, : visual + text] = 1
    batch["positions"][0, : visual + text] = np.arange(visual + text)
    return batch


@pytest.mark.parametrize(
    ("visual", "text", "slots", "end"),
    [(4, 4, 8, 4), (5, 0, 8, 8), (5, 4, 12, 8), (8, 4, 12, 8), (8, 0, 8, 8), (0, 4, 4, 0), (0, 0, 4, 0)],
)
def test_ragged_rows_that_just_fit(visual, text, slots, end):
    packed = ragged(filled(visual, text), slots, 4)
    assert packed["visual_slots"].tolist() == [end]
    assert packed["order"][0, : visual + text].tolist() == [*range(visual), *range(end, end + text)]
    assert sorted(packed["order"][0].tolist()) == list(range(slots))
    assert packed["positions"][0].tolist() == [*range(visual + text), *[0] * (slots - visual - text)]


@pytest.mark.parametrize(
    ("visual", "text", "slots", "message"),
    [(5, 1, 8, "row 0 needs 9 slots"), (4, 4, 4, "needs 8 slots"), (1, 1, 16, "at most 12"), (1, 1, 6, "multiple")],
)
def test_ragged_rows_that_just_do_not_fit(visual, text, slots, message):
    with pytest.raises(ValueError, match=message):
        ragged(filled(visual, text), slots, 4)
