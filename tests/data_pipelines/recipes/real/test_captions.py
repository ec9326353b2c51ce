"""Pictures with captions: shards, captions beside them, and what is held out."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from data_pipelines.recipes.jsonl import read_jsonl
from data_pipelines.recipes.real.captions import RECIPES
from data_pipelines.recipes.real.catalogue import Options, is_heldout
from data_pipelines.recipes.shard_writer import read_captions


def test_captions_lie_beside_the_alt_text_of_the_shards(tmp_path: Path) -> None:
    stamps = tmp_path / "root/usr/share/tuxpaint/stamps/fruit"
    stamps.mkdir(parents=True)
    names = [f"fruit_{number}" for number in range(60)]
    for name in names:
        Image.new("RGBA", (1500, 40), (200, 0, 0, 0)).save(stamps / f"{name}.png")
        (stamps / f"{name}.txt").write_text(f"This is {name}.\n")
    counts = RECIPES["tuxpaint"](Options(), tmp_path / "set", [tmp_path / "root"])
    heldout = sorted(name for name in names if is_heldout(name))
    trained = sorted(name for name in names if not is_heldout(name))
    assert counts == {"pairs": len(trained), "held out": len(heldout)} and heldout
    assert list(read_captions(tmp_path / "set")) == ["fruit fruit"] * len(trained)  # numbers are no words
    assert [record["caption"] for record in read_jsonl(tmp_path / "set/captions.jsonl")] == [
        f"This is {name}." for name in trained
    ]
    records = list(read_jsonl(tmp_path / "set/heldout.jsonl"))
    assert [record["conversations"][1]["value"] for record in records] == [f"This is {name}." for name in heldout]
    image = Image.open(tmp_path / "set/images" / records[0]["image"])
    assert image.size == (1024, 27) and min(image.getpixel((5, 5))) > 250  # reduced, on white
