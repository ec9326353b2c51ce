"""The demo sets: whole, repeatable, resumable, and with nothing held out among what is trained on."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from data_pipelines import demo_sets
from data_pipelines.errors import DataError
from data_pipelines.recipes import sets
from data_pipelines.recipes import shard_writer as shards

SIZES = demo_sets.DemoSizes(
    text_bytes=200_000, s1_1=60, s1_2=40, s1_3=60, s2=60, heldout_captions=20, heldout_questions=80
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    demo_sets.build_demo_sets(root, sizes=SIZES)
    return root


@pytest.fixture(scope="module")
def manifest(built: Path) -> dict[str, Any]:
    return sets.load_manifest(built)


def _files(root: Path) -> dict[str, bytes]:
    volatile = ("_stats.json",)
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and not p.name.endswith(volatile)
    }


def _pairs(folder: Path) -> list[tuple[str, Image.Image, str]]:
    pairs = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        for name in content:
            if name.endswith(".jpg"):
                key = name[:-4]
                pairs.append((key, Image.open(io.BytesIO(content[name])), content[f"{key}.txt"].decode()))
    return pairs


def test_manifest_names_files_that_exist_and_their_samples(manifest: dict[str, Any], built: Path) -> None:
    assert list(manifest["stages"]) == list(sets.STAGES)
    assert {s: v["samples"] for s, v in manifest["stages"].items() if s != "s0"} == {
        "s1_1": 60, "s1_2": 40, "s1_3": 60, "s2": 60,
    }  # fmt: skip
    for stage in manifest["stages"].values():
        for source in stage["sources"]:
            (pattern,) = source["spec"]["paths"]
            assert Path(pattern).is_absolute() and list(Path(pattern).parent.glob(Path(pattern).name)), pattern
            for key in ("captions", "image_root"):
                assert key not in source["spec"] or Path(source["spec"][key]).exists()
    weights = {s["name"]: s["weight"] for s in manifest["stages"]["s1_3"]["sources"]}
    assert weights == {"caption": 0.539, "detection": 0.052, "ocr": 0.409}
    text = Path(manifest["heldout"]["text"]).read_text()
    assert 0 < len(text) < SIZES.text_bytes
    assert len(list(shards.read_jsonl(manifest["heldout"]["questions"]["path"]))) == 80


def test_pictures_have_the_tile_size_and_captions_join(manifest: dict[str, Any], built: Path) -> None:
    edge = manifest["tile_size"]
    assert edge % manifest["token_pixels"] == 0
    for stage in ("s1_1", "s1_2", "s1_3/caption", "s1_3/detection", "s1_3/ocr"):
        pairs = _pairs(built / stage)
        assert pairs and all(image.size == (edge, edge) and text for _, image, text in pairs)
    joined = {r["key"]: r["caption"] for r in shards.read_jsonl(built / "s1_2/captions.jsonl")}
    assert sorted(joined) == sorted(key for key, _, _ in _pairs(built / "s1_2"))
    assert all(text.startswith("<ref>") for _, _, text in _pairs(built / "s1_3/detection"))


def test_conversations_name_their_images(built: Path) -> None:
    counts = set()
    for path in sorted((built / "s2").glob("*.jsonl")):
        for record in shards.read_jsonl(path):
            images = record.get("image", [])
            images = [images] if isinstance(images, str) else images
            placeholders = sum(turn["value"].count("<image>") for turn in record["conversations"])
            assert placeholders == len(images)
            assert all((built / "s2/images" / image).is_file() for image in images)
            assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * (
                len(record["conversations"]) // 2
            )
            counts.add(len(images))
    assert counts == {0, 1, 2}


def test_nothing_held_out_is_trained_on(built: Path) -> None:
    trained = {p.read_bytes() for p in (built / "s2/images").iterdir()}
    assert not any(p.read_bytes() in trained for p in (built / "heldout/images").iterdir())
    training_text = set((built / "text/train.txt").read_text().splitlines()) - {""}
    heldout_text = set((built / "text/heldout.txt").read_text().splitlines()) - {""}
    assert heldout_text and not training_text & heldout_text
    train, exam = (demo_sets.Painter(64, heldout=side) for side in (False, True))
    digits = [{p.digit(np.random.default_rng(i)).origin for i in range(300)} for p in (train, exam)]
    assert not digits[0] & digits[1]


def test_the_majority_answer_is_rare(manifest: dict[str, Any]) -> None:
    questions = manifest["heldout"]["questions"]
    answers = [r["conversations"][1]["value"] for r in shards.read_jsonl(questions["path"])]
    assert questions["majority_accuracy"] == answers.count(questions["majority_answer"]) / len(answers) <= 0.25


def test_tokenizer_is_laid_out_as_the_real_one(built: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer/tokenizer.model"))
    added = json.loads((built / "tokenizer/added_tokens.json").read_text())
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert sorted(added.values()) == list(range(len(model), len(model) + len(added)))
    assert {"<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "<box>"} <= set(added)
    for text in ("what color is the circle?\n", "  é漢 raw\ttext "):
        assert model.decode(model.encode(text)) == text
    assert len(model.encode("a red circle above a blue square")) <= 8


def test_a_second_build_changes_nothing_and_an_interrupted_one_goes_on(built: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*.tar")}
    said: list[str] = []
    demo_sets.build_demo_sets(built, sizes=SIZES, progress=said.append)
    assert not said and before == {p: p.stat().st_mtime_ns for p in built.rglob("*.tar")}

    def stop(line: str) -> None:
        if "s1_2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_sets.build_demo_sets(tmp_path, sizes=SIZES, progress=stop)
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        sets.load_manifest(tmp_path)
    (tmp_path / ".s1_3.part").mkdir()
    (tmp_path / ".s1_3.part/rubbish").touch()
    demo_sets.build_demo_sets(tmp_path, sizes=SIZES)
    assert _files(tmp_path) == _files(built)


def test_other_settings_rebuild(built: Path, tmp_path: Path) -> None:
    painter = demo_sets.Painter(32, heldout=False)
    one, two, other = (painter.any(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.image.size == (32, 32)
    assert one.image.tobytes() == two.image.tobytes() != other.image.tobytes()
    sizes = dataclasses.replace(SIZES, s1_1=20)
    lines: list[str] = []
    root = tmp_path / "sets"
    shutil.copytree(built, root)
    manifest = demo_sets.build_demo_sets(root, sizes=sizes, progress=lines.append)
    assert manifest["stages"]["s1_1"]["samples"] == 20 == len(_pairs(root / "s1_1"))
    assert any("s1_1" in line for line in lines)


def test_bad_arguments_are_errors_that_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no multiple of token_pixels=28"):
        demo_sets.build_demo_sets(tmp_path, token_pixels=28)
    with pytest.raises(DataError, match=r"^demo set size s2=3: at least 20$"):
        demo_sets.main([f"--out={tmp_path}", "--s2=3"])
