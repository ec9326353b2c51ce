"""The pairs of stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.recipes.demo.build import DemoBuild
from data_pipelines.recipes.demo.pairs import write_s1_1
from data_pipelines.recipes.jsonl import read_jsonl
from tests.data_pipelines.recipes.demo.demo_tools import SIZES, tar_pairs


def test_pictures_have_the_tile_size_and_captions_join(demo_manifest: dict[str, Any], demo_dir: Path) -> None:
    edge = demo_manifest["tile_size"]
    assert edge % demo_manifest["token_pixels"] == 0
    for stage in ("s1_1", "s1_2", "s1_3/caption", "s1_3/detection", "s1_3/ocr"):
        pairs = tar_pairs(demo_dir / stage)
        assert pairs and all(image.size == (edge, edge) and text for _, image, text in pairs)
    joined = {r["key"]: r["caption"] for r in read_jsonl(demo_dir / "s1_2/captions.jsonl")}
    assert sorted(joined) == sorted(key for key, _, _ in tar_pairs(demo_dir / "s1_2"))
    assert all(text.startswith("<ref>") for _, _, text in tar_pairs(demo_dir / "s1_3/detection"))


def test_as_many_alt_texts_belong_to_other_pictures_as_asked_for(tmp_path: Path) -> None:
    texts = {}
    for share in (0, 0.02, 0.25, 1):
        write_s1_1(DemoBuild(tmp_path, 0, SIZES, 64, 512, share), folder := tmp_path / str(share))
        texts[share] = [text for _, _, text in tar_pairs(folder)]
    wrong = {share: sum(a != b for a, b in zip(texts[0], texts[share])) for share in texts}
    assert wrong[0.02] == SIZES.s1_1 // 50 and wrong[0.25] == SIZES.s1_1 // 4
    assert wrong[1] > 0.9 * SIZES.s1_1, "a few are alike by chance"
