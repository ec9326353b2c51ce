"""Drawings with their descriptions, read from small trees with the form of the packages."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.recipes.real.readers import clipart
from tests.data_pipelines.recipes.real.readers.package_files import write_picture, write_text


def test_openclipart_reads_titles_descriptions_and_keywords(tmp_path: Path) -> None:
    drawings, pictures = (tmp_path / f"usr/share/openclipart/{kind}" for kind in ("svg", "png"))
    descriptions = {
        "described": "<dc:title>A Flask</dc:title><dc:description>with &amp;quot;bubbles&amp;quot;</dc:description>",
        "key_words_01": "<dc:title>unsorted</dc:title><rdf:li>glass</rdf:li><rdf:li>tool</rdf:li>"
        + "<rdf:li>glass</rdf:li>",
        "nameless": "",
    }
    for name, content in descriptions.items():
        write_text(drawings / f"a/{name}.svg", f"<svg>{content}</svg>")
        write_picture(pictures / f"a/{name}.png")
    write_picture(pictures / "a/without_drawing.png")
    captions = {Path(str(p.picture)).stem: p.caption for p in clipart.read_openclipart(tmp_path, tmp_path)}
    assert captions == {
        "described": 'A Flask: with "bubbles"',
        "key_words_01": "key words, glass, tool",
        "nameless": "nameless",
    }


def test_stamps_have_translations(tmp_path: Path) -> None:
    stamps = tmp_path / "usr/share/tuxpaint/stamps/animals"
    write_picture(stamps / "frog.png")
    write_text(stamps / "frog.txt", "A frog.\nde.utf8=Ein Frosch.\nxx.utf8=?\nfr.utf8=\n")
    write_text(stamps / "no_picture.txt", "Nothing.")
    (pair,) = clipart.read_tuxpaint(tmp_path)
    assert (pair.caption, pair.alt, dict(pair.translations)) == ("A frog.", "animals frog", {"German": "Ein Frosch."})


def test_units_are_described(tmp_path: Path) -> None:
    config = '[unit_type]\n name= _ "Boat"\n image="units/boat.png~RC(x)"\n description= _"Propelled by ""oars""."\n'
    write_text(tmp_path / "data/core/units/boats/Boat.cfg", config)
    write_text(tmp_path / "data/core/units/boats/Nameless.cfg", '[unit_type]\n image="units/boat.png"\n')
    write_picture(tmp_path / "data/core/images/units/boat.png")
    (pair,) = clipart.read_wesnoth(tmp_path)
    assert pair.caption == 'Boat: Propelled by "oars".'
