"""Metadata filters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, keys, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def write_noisy(path: Path) -> Path:
    """Eight pairs, each with one fault but the first."""
    rows = [
        ("good", encoded(64, 64, seed=0), "a good caption", {}),
        ("small", encoded(64, 20, seed=1), "a small caption", {}),
        ("long", encoded(400, 64, seed=2), "a long caption", {}),
        ("unlike", encoded(64, 64, seed=3), "an unlike caption", {"similarity": 0.1}),
        ("unsafe", encoded(64, 64, seed=4), "an unsafe caption", {"punsafe": 0.9}),
        ("marked", encoded(64, 64, seed=5), "a marked caption", {"pwatermark": None}),
        ("short", encoded(64, 64, seed=6), "ab", {}),
        ("russian", encoded(64, 64, seed=7), "подпись к картинке", {}),
        ("again", encoded(64, 64, seed=8), "a good caption", {}),
        ("copy", encoded(64, 64, seed=0), "another caption", {}),
    ]
    members = []
    for key, image, caption, faults in rows:
        fields = {"similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.1, **faults}
        members += [
            (f"{key}.jpg", image),
            (f"{key}.json", json.dumps(fields).encode()),
            (f"{key}.txt", caption.encode()),
        ]
    return write_tar(path, members)


def test_every_filter_counts_what_it_drops(tmp_path: Path) -> None:
    path = write_noisy(tmp_path / "n.tar")
    filters = {
        "min_size": 64,
        "max_aspect_ratio": 3,
        "min_similarity": 0.3,
        "max_punsafe": 0.5,
        "max_pwatermark": 0.1,
        "min_caption_chars": 3,
        "max_caption_chars": 100,
        "scripts": ["latin", "han"],
        "unique_captions": True,
        "unique_images": True,
    }
    source = open_source({"kind": "tar", "paths": str(path), "filters": filters})
    assert keys(source) == ["n/good"]
    reasons = ["too_small", "aspect_ratio", "similarity", "punsafe", "pwatermark", "caption_too_short", "script"]
    assert source.dropped() == dict.fromkeys([*reasons, "duplicate_caption", "duplicate_image"], 1)
    assert len(open_source({"kind": "tar", "paths": str(path), "filters": {}})) == 10


def test_sha256_of_img2dataset_serves_as_image_hash(tmp_path: Path) -> None:
    members = []
    for i, mark in enumerate(["x", "y", "x"]):
        members += [(f"{i}.jpg", encoded(seed=i)), (f"{i}.json", json.dumps({"caption": "c", "sha256": mark}).encode())]
    path = write_tar(tmp_path / "a.tar", members)
    source = open_source({"kind": "tar", "paths": str(path), "filters": {"unique_images": True}})
    assert keys(source) == ["a/0", "a/1"]
