"""Emoji with their names."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipelines.recipes.real.readers.emoji import read_fluent
from tests.data_pipelines.recipes.real.readers.package_files import write_picture, write_text


def test_emoji_are_joined_with_their_names(tmp_path: Path) -> None:
    entry = {"label": "hand", "hexcode": "1F44B", "tags": ["wave"]}
    dark = {"label": "hand: dark skin tone", "hexcode": "1F44B-1F3FF-FE0F"}
    write_text(
        tmp_path / "package/en/data.json", json.dumps([{**entry, "skins": [dark]}, {"label": "x", "hexcode": "1F"}])
    )
    write_text(tmp_path / "package/de/data.json", json.dumps([{"label": "Hand", "hexcode": "1F44B"}]))
    for code in ("1f44b", "1f44b-1f3ff"):
        write_picture(tmp_path / f"package/assets/{code}.webp")
    hand, dark_hand = read_fluent(tmp_path, tmp_path)
    assert (hand.caption, hand.alt, dict(hand.translations)) == ("an emoji of hand", "wave", {"German": "Hand"})
    assert dark_hand.caption == "an emoji of hand: dark skin tone"
    assert hand.group == dark_hand.group  # so that no shade of a held-out emoji is trained on
