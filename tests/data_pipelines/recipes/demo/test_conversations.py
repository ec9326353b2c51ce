"""The conversations that are trained on."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.recipes.jsonl import read_jsonl


def test_conversations_name_their_images(demo_dir: Path) -> None:
    counts = set()
    for path in sorted((demo_dir / "s2").glob("*.jsonl")):
        for record in read_jsonl(path):
            images = record.get("image", [])
            images = [images] if isinstance(images, str) else images
            placeholders = sum(turn["value"].count("<image>") for turn in record["conversations"])
            assert placeholders == len(images)
            assert all((demo_dir / "s2/images" / image).is_file() for image in images)
            assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * (
                len(record["conversations"]) // 2
            )
            counts.add(len(images))
    assert counts == {0, 1, 2}
