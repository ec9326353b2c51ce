import pytest

from data_pipelines.errors import DataError
from data_pipelines.inspection.plans import suggestions, whole_epoch
from tests.made_sets import config, packed, tars


def test_an_epoch_is_counted(golden_dir, pairs, cache):
    data, said = packed(config(golden_dir, tars(pairs)), cache), []
    result = whole_epoch(data, said.append)
    assert result["units"] == 130 and result["steps"] == data.total_steps() and len(said) == 1
    assert 0 < result["visual_occupancy"] <= 1 and 0 < result["text_occupancy"] <= 1


def test_suggestions_are_a_table(golden_dir, pairs, cache):
    said: list[str] = []
    found = suggestions(packed(config(golden_dir, tars(pairs)), cache), say=said.append)
    assert len(said) == len(found) + 1 and all(c["visual_tokens"] + c["text_tokens"] <= 352 for c in found)
    ragged = config(golden_dir, tars(pairs), visual_tokens=320, text_tokens=240, boundary_block=16)
    with pytest.raises(DataError, match="chooses V and T"):
        suggestions(packed(ragged, cache))
