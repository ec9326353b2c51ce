"""The demo sets: complete, repeatable, resumable."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_pipelines.errors import DataError
from data_pipelines.recipes.demo.sets import build_demo_sets
from data_pipelines.recipes.jsonl import read_jsonl
from data_pipelines.recipes.manifest import STAGES, load_manifest
from tests.data_pipelines.recipes.demo.demo_tools import SIZES, tar_pairs


def _files(root: Path) -> dict[str, bytes]:
    volatile = ("_stats.json",)
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and not p.name.endswith(volatile)
    }


def test_manifest_names_files_that_exist_and_their_samples(demo_manifest: dict[str, Any], demo_dir: Path) -> None:
    assert list(demo_manifest["stages"]) == list(STAGES)
    assert {s: v["samples"] for s, v in demo_manifest["stages"].items() if s != "s0"} == {
        "s1_1": 60, "s1_2": 40, "s1_3": 60, "s2": 60,
    }  # fmt: skip
    for stage in demo_manifest["stages"].values():
        for source in stage["sources"]:
            (pattern,) = source["spec"]["paths"]
            assert Path(pattern).is_absolute() and list(Path(pattern).parent.glob(Path(pattern).name)), pattern
            for key in ("captions", "image_root"):
                assert key not in source["spec"] or Path(source["spec"][key]).exists()
    weights = {s["name"]: s["weight"] for s in demo_manifest["stages"]["s1_3"]["sources"]}
    assert weights == {"caption": 0.539, "detection": 0.052, "ocr": 0.409}
    text = Path(demo_manifest["heldout"]["text"]).read_text()
    assert 0 < len(text) < SIZES.text_bytes
    assert len(list(read_jsonl(demo_manifest["heldout"]["questions"]["path"]))) == 80


def test_the_tokenizer_has_the_layout_of_the_real_one(demo_dir: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(demo_dir / "tokenizer/tokenizer.model"))
    added = json.loads((demo_dir / "tokenizer/added_tokens.json").read_text())
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert sorted(added.values()) == list(range(len(model), len(model) + len(added)))
    assert {"<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "<box>"} <= set(added)
    for text in ("what color is the circle?\n", "  é漢 raw\ttext "):
        assert model.decode(model.encode(text)) == text
    assert len(model.encode("a red circle above a blue square")) <= 8


def test_a_second_build_changes_nothing_and_an_interrupted_one_resumes(demo_dir: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo_dir.rglob("*.tar")}
    lines: list[str] = []
    build_demo_sets(demo_dir, sizes=SIZES, progress=lines.append)
    assert not lines and before == {p: p.stat().st_mtime_ns for p in demo_dir.rglob("*.tar")}

    def stop(line: str) -> None:
        if "s1_2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_demo_sets(tmp_path, sizes=SIZES, progress=stop)
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        load_manifest(tmp_path)
    killed = tmp_path / f"s1_3.{'0' * 32}.tmp"  # as a process leaves it that is killed while it builds
    killed.mkdir()
    (killed / "rubbish.parquet").touch()
    for path in (killed / "rubbish.parquet", killed):
        os.utime(path, (time.time() - 1e6,) * 2)
    build_demo_sets(tmp_path, sizes=SIZES)
    assert _files(tmp_path) == _files(demo_dir)


def test_other_settings_rebuild(demo_dir: Path, tmp_path: Path) -> None:
    sizes = dataclasses.replace(SIZES, s1_1=20)
    lines: list[str] = []
    root = tmp_path / "sets"
    shutil.copytree(demo_dir, root)
    manifest = build_demo_sets(root, sizes=sizes, progress=lines.append)
    assert manifest["stages"]["s1_1"]["samples"] == 20 == len(tar_pairs(root / "s1_1"))
    assert any("s1_1" in line for line in lines)


def test_pictures_must_hold_whole_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a multiple of token_pixels=28"):
        build_demo_sets(tmp_path, token_pixels=28)
