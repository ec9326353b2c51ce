"""Opening pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.recipes.real.readers.pictures import on_white, open_picture
from tests.data_pipelines.recipes.real.readers.package_files import write_picture, write_text


def test_open_picture_names_what_is_wrong(tmp_path: Path) -> None:
    write_picture(tmp_path / "small.png", (8, 400))
    write_text(tmp_path / "text.png", "<html>")
    for name, reason in (("small.png", "image_too_small"), ("text.png", "unreadable"), ("none.png", "unreadable")):
        with pytest.raises(BadSample) as error:
            open_picture(tmp_path / name)
        assert error.value.reason == reason
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    opened = open_picture(tmp_path / "clear.png")
    assert opened.mode == "RGBA" and on_white(opened).getpixel((0, 0)) == (255, 255, 255)
