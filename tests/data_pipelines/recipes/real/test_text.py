"""English text: every fiftieth document is held out."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.recipes.real.catalogue import Options
from data_pipelines.recipes.real.text import RECIPES


def test_every_fiftieth_document_is_held_out(tmp_path: Path) -> None:
    data = tmp_path / "root/package/data"
    data.mkdir(parents=True)
    line = "A paragraph that is long enough to be kept as one, with the number"
    for number in range(110):
        (data / f"{number:03d}.txt").write_text(f"{line} {number}.")
    folder = tmp_path / "set"
    counts = RECIPES["sotu"](Options(), folder, [tmp_path / "root"])
    heldout = (folder / "heldout.txt").read_text()
    assert heldout == f"{line} 49.\n\n{line} 99.\n\n"
    train = (folder / "train.txt").read_text()
    assert counts == {"documents": 108, "bytes": len(train), "held-out bytes": len(heldout)}
    assert train.count("\n\n") == 108
    assert RECIPES["sotu"](Options(limit=3), folder, [tmp_path / "root"])["documents"] == 3
