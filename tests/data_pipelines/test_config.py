import dataclasses
from typing import Any

import pytest

from data_pipelines import strict
from data_pipelines.config import BATCH_FIELDS, CAPTION_PROMPT, DataConfig, SourceConfig
from data_pipelines.errors import DataError

SOURCE = {"name": "pairs", "spec": {"kind": "tar", "paths": "*.tar"}}


def config(**changes: Any) -> DataConfig:
    return DataConfig.from_dict({"sources": [SOURCE], "tokenizer": "folder", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visul": 3}, "did you mean 'visual_tokens'"),
        ({"rows": 3}, "data: unknown key 'rows'"),
        ({"tile_size": 56}, "data: unknown key 'tile_size'"),
        ({"shuffle": "globl"}, "did you mean 'global'"),
        ({"pixel_path": "quick"}, "data.pixel_path is 'quick': "),
        ({"visual_tokens": "8"}, "data.visual_tokens is '8': it must be a whole number, at least 0"),
        ({"visual_tokens": -1}, "at least 0"),
        ({"thumbnail": "no"}, "data.thumbnail is 'no': it must be True or False"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_piece": -5}, "max_piece is -5"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5"),
        ({"max_tiles": 2, "min_tiles": 3}, "data.max_tiles is 2: it must be at least data.min_tiles, 3"),
        ({"visual_tokens": 100, "text_tokens": 50, "boundary_block": 16}, "multiple of it"),
        ({"sources": ["a.tar"]}, r"sources.0 is 'a.tar': it must be a mapping"),
        ({"sources": []}, "data.sources is empty"),
        ({"sources": {"a": {"spec": "a.tar"}}}, "sources.a.spec is 'a.tar': it must be a mapping"),
        ({"sources": {"a": {"weight": 1}}}, "data.sources.a.spec is missing: give a mapping with 'kind' and 'paths'"),
        ({"sources": {"a": {"spec": {"kind": "tar"}, "prompts": [1]}}}, "data.sources.a.prompts.0 is 1: it must be a"),
        ({"sources": {"a": {"spec": {"kind": "tar"}, "weight": 0}}}, "data.sources.a.weight is 0: it must be"),
        ({"sources": [SOURCE, SOURCE]}, "names must differ"),
        ({"sources": [SOURCE, {**SOURCE, "name": "b", "weight": 1}]}, "but sum to 1: give every source a weight"),
        ({"tokenizer": ""}, "data.tokenizer is missing"),
        ({"tokenizer": None}, "data.tokenizer is None: it must be a string"),
    ],
)
def test_bad_values_are_one_line_that_names_the_key(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_sources_by_name_or_number():
    spec = {"kind": "tar"}
    assert [s.name for s in config(sources=[{"spec": spec}, {"spec": spec}]).sources] == ["source0", "source1"]
    named = config(sources={"a": {"spec": spec, "prompts": "what?"}, "b": {"spec": spec, "prompts": []}}).sources
    assert named == (SourceConfig("a", spec, None, ("what?",)), SourceConfig("b", spec, None, (CAPTION_PROMPT,)))


def test_a_config_survives_json():
    made = config(sources=[{**SOURCE, "weight": 2, "prompts": ["a", "b"]}], max_aspect=3)
    assert DataConfig.from_dict(strict.to_dict(made)) == made


def test_only_speed_may_change_on_resume():
    """Every other field decides the batches, or what its source is."""
    free = {"workers", "prefetch", "retries", "storage_wait_s", "crop_size"}
    names = {field.name for field in dataclasses.fields(DataConfig)}
    assert names - free - set(BATCH_FIELDS) == {"sources", "tokenizer", "source_ids"}
    for key, value in (("workers", 3), ("prefetch", 5), ("seed", 1)):
        [change] = strict.changes(strict.to_dict(config()), strict.to_dict(config(**{key: value})), DataConfig)
        assert change.on_resume == ("free" if key in free else "fixed")


def test_a_ragged_boundary_costs_less_than_a_block():
    assert config(visual_tokens=40, text_tokens=40).most_tokens(4) == 80
    ragged = config(visual_tokens=40, text_tokens=40, boundary_block=8)
    assert ragged.most_tokens(4) == 33 and ragged.most_tokens(16) == 40
