"""Conversations in LLaVA's form."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from data_pipelines.recipes.conversations import Conversation, boxes_text, by_question


def test_images_are_saved_and_named(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    record = Conversation("a", [image], [("what?", "it"), ("and?", "that")], "kind").save(tmp_path / "images")
    assert record == {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "it"},
            {"from": "human", "value": "and?"},
            {"from": "gpt", "value": "that"},
        ],
        "image": "a.png",
        "kind": "kind",
    }
    assert Image.open(tmp_path / "images/a.png").size == (4, 4)
    record = Conversation("b", [image, image], [("<image>\n1?", "x"), ("<image>\n2?", "y")]).save(tmp_path, "jpg")
    assert record["image"] == ["b_0.jpg", "b_1.jpg"] and "kind" not in record
    assert [turn["value"] for turn in record["conversations"]] == ["<image>\n1?", "x", "<image>\n2?", "y"]
    assert Image.open(tmp_path / "b_1.jpg").format == "JPEG"
    assert "image" not in Conversation("c", [], [("what?", "it")]).save(tmp_path)


def test_boxes_follow_their_labels() -> None:
    text = boxes_text([("a cat", (1, 2, 3, 4)), ("dog", (0, 0, 1000, 1000))])
    assert text == "<ref>a cat</ref><box>[[1, 2, 3, 4]]</box><ref>dog</ref><box>[[0, 0, 1000, 1000]]</box>"


def test_each_question_is_a_record_with_the_image(tmp_path: Path) -> None:
    record = Conversation("a", [Image.new("RGB", (4, 4))], [("what?", "it"), ("and?", "that")], "kind").save(tmp_path)
    first, second = by_question(record)
    assert {**second, "conversations": None} == {"id": "a_01", "conversations": None, "image": "a.png", "kind": "kind"}
    assert [turn["value"] for turn in second["conversations"]] == ["<image>\nand?", "that"]
    assert first["conversations"] == record["conversations"][:2] and first["id"] == "a_00"
