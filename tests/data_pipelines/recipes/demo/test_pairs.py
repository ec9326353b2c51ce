"""The pairs of stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.recipes.jsonl import read_jsonl
from tests.data_pipelines.recipes.demo.demo_tools import tar_pairs


def test_pictures_have_the_tile_size_and_captions_join(demo_manifest: dict[str, Any], demo_dir: Path) -> None:
    edge = demo_manifest["tile_size"]
    assert edge % demo_manifest["token_pixels"] == 0
    for stage in ("s1_1", "s1_2", "s1_3/caption", "s1_3/detection", "s1_3/ocr"):
        pairs = tar_pairs(demo_dir / stage)
        assert pairs and all(image.size == (edge, edge) and text for _, image, text in pairs)
    joined = {r["key"]: r["caption"] for r in read_jsonl(demo_dir / "s1_2/captions.jsonl")}
    assert sorted(joined) == sorted(key for key, _, _ in tar_pairs(demo_dir / "s1_2"))
    assert all(text.startswith("<ref>") for _, _, text in tar_pairs(demo_dir / "s1_3/detection"))
