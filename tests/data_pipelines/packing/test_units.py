import numpy as np

from data_pipelines.packing.lengths import Lengths
from data_pipelines.packing.units import Units

META = {"reasons": [], "bad": {}}


def lengths(counts: list[list[int]], plain: bool) -> Lengths:
    return Lengths(np.array(counts, np.int32), {**META, "plain": plain})


def test_samples_are_units_where_nothing_is_cut():
    units = Units(lengths([[4, 5], [0, 7]], False), 20, 1)
    assert units.count == 2
    assert [column.tolist() for column in units.get(np.array([1, 0]))] == [[1, 0], [0, 0], [0, 4], [7, 5]]


def test_plain_text_is_cut_into_pieces():
    units = Units(lengths([[0, -45], [4, 9], [0, -19]], True), 20, 1)
    assert units.count == 5
    samples, pieces, _, text = (column.tolist() for column in units.get(np.arange(5)))
    assert samples == [0, 0, 0, 1, 2] and pieces == [0, 1, 2, 0, 0] and text == [20, 20, 8, 9, 20]
