import numpy as np

from data_pipelines.batch import BatchSpec
from data_pipelines.inspection.batches import Occupancy, batch_hash, inspect
from tests.made_sets import config, packed, tars


def test_a_hash_covers_names_types_shapes_and_values():
    batch = {"a": np.zeros(4, np.int32)}
    others = [{"b": batch["a"]}, {"a": np.zeros(4, np.uint32)}, {"a": np.zeros((2, 2), np.int32)}, {"a": np.ones(4)}]
    assert len({batch_hash(batch), *map(batch_hash, others)}) == 5
    assert batch_hash({"a": np.zeros(8, np.int32)[::2]}) == batch_hash(batch)


def test_occupancy_counts_both_kinds():
    batch, occupancy = BatchSpec(4, 2, 2).empty(2), Occupancy()
    batch["order"][0] = [0, 4, 1, 2, 3, 5]
    batch["segments"][0, :2] = 1
    assert occupancy.add(batch) == (1, 1)
    assert occupancy.shares() == {"visual_occupancy": 1 / 8, "text_occupancy": 1 / 4}
    assert Occupancy().shares()["visual_occupancy"] is None


def test_what_is_said_and_returned(golden_dir, pairs, cache):
    said: list[str] = []
    result = inspect(packed(config(golden_dir, tars(pairs)), cache), 1, 2, hosts=2, say=said.append)
    assert [item["step"] for item in result["steps"]] == [1, 2] and result["samples"] > 0
    assert said[0].startswith(f"step 1  {result['steps'][0]['sha256'][:16]}  ") and "2 steps, " in said[-1]
