"""Meta files of InternVL and mixes of LLaVA-OneVision: what they say of their sets is obeyed or named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, keys, write_jsonl
from tests.made_sets import config, packed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of four samples whose images, three times as wide as high, lie in "im"."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "x.jpg").write_bytes(encoded(150, 50))
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", *[{"image": "im/x.jpg", "conversations": TALK}] * 4)
    return tmp_path


def meta(folder: Path, **sets: object) -> dict:
    sets = {name: {"root": ".", **value} if isinstance(value, dict) else value for name, value in sets.items()}
    (folder / "meta.json").write_text(json.dumps(sets).replace('"."', json.dumps(str(folder))))
    return {"kind": "jsonl", "paths": str(folder / "meta.json")}


def test_tiles_of_each_set(folder: Path, golden_dir: Path) -> None:
    spec = meta(
        folder,
        ocr={"annotation": "a.jsonl", "max_dynamic_patch": 1, "data_augment": False, "length": 4},
        big={"annotation": "b.jsonl", "max_dynamic_patch": 12},
    )
    settings = config(golden_dir, {"name": "mix", "spec": spec}, visual_tokens=64)
    data = packed(settings, folder / "kept")
    counts = data.plan.units[0].lengths.counts[:, 0].tolist()
    wide = packed(dataclasses.replace(settings, max_tiles=12), folder / "wide").plan.units[0].lengths.counts[4:, 0]
    assert counts == [4] * 4 + wide.tolist() and (wide > 4).all()
    assert data.batch(0)["segments"].any() and data.report.skipped == {}
    fingerprints = {
        open_source(spec).fingerprint(),
        open_source(meta(folder, a={"annotation": "a.jsonl"})).fingerprint(),
    }
    for most in (1, 2):
        fingerprints.add(
            open_source(meta(folder, a={"annotation": "a.jsonl", "max_dynamic_patch": most})).fingerprint()
        )
    assert len(fingerprints) == 4


def test_augmentation_of_one_set(folder: Path, golden_dir: Path) -> None:
    def patches(**more: object) -> np.ndarray:
        spec = meta(folder, a={"annotation": "a.jsonl", **more})
        return packed(config(golden_dir, {"name": "a", "spec": spec}, shuffle="none"), folder / "kept").batch(0)[
            "patches"
        ]

    plain = patches()
    np.testing.assert_array_equal(plain, patches(data_augment=False))
    assert (plain != patches(data_augment=True)).any()


def test_lists_of_annotations_and_comments(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    mix = {"annotation": ["a.jsonl", "b.jsonl"], "repeat_time": 1, "max_dynamic_patches": 3}
    source = open_source(meta(folder, _comment="mine", x=mix))
    assert keys(source) == [f"{name}.jsonl:{line}" for name in "ab" for line in (1, 2, 3, 4)]
    assert "'_comment' is not a data set" in caplog.text
    assert "unknown key 'max_dynamic_patches' of 'x' is ignored; did you mean 'max_dynamic_patch'?" in caplog.text
    with pytest.raises(DataError, match="'y' has no annotation; its keys: root"):
        open_source(meta(folder, x=mix, y={}))
    with pytest.raises(DataError, match="'y' has no annotation; its keys: root, annotations"):
        open_source(meta(folder, y={"root": ".", "annotations": "a.jsonl"}))
    with pytest.raises(DataError, match=r"annotation of 'x' is empty: \[\]"):
        open_source(meta(folder, x={"annotation": []}))
    for key, wrong in (("max_dynamic_patch", "12"), ("data_augment", "false"), ("repeat_time", "2")):
        with pytest.raises(DataError, match=f"{key} of 'x' must be .*, got '{wrong}'"):
            open_source(meta(folder, x={"annotation": "a.jsonl", key: wrong}))


@pytest.mark.parametrize(
    ("strategy", "lines"),
    [("all", [1, 2, 3, 4]), ("first:2", [1, 2]), ("first:50%", [1, 2]), ("end:25%", [4]), ("end:9", [1, 2, 3, 4])],
)
def test_mixes_of_onevision(folder: Path, strategy: str, lines: list[int]) -> None:
    (folder / "mix.yaml").write_text(f"datasets:\n  - json_path: a.jsonl\n    sampling_strategy: '{strategy}'\n")
    source = open_source({"kind": "jsonl", "paths": str(folder / "mix.yaml")})
    assert keys(source) == [f"a.jsonl:{line}" for line in lines]
    (folder / "mix.yaml").write_text("datasets:\n  - json_path: '{a,b}.jsonl'\n    sampling_strategy: 'random:75%'\n")
    assert len(open_source({"kind": "jsonl", "paths": str(folder / "mix.yaml")})) == 6
    (folder / "mix.yaml").write_text("datasets:\n  - json_path: a.jsonl\n    sampling_strategy: some\n")
    with pytest.raises(DataError, match="sampling_strategy 'some' must be"):
        open_source({"kind": "jsonl", "paths": str(folder / "mix.yaml")})
