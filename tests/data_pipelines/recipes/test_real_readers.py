"""Readers of packages, on small trees of the same form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.recipes.real import readers


def _write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def _picture(path: Path, size: tuple[int, int] = (40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def test_openclipart_reads_titles_descriptions_and_keywords(tmp_path: Path) -> None:
    drawings, pictures = (tmp_path / f"usr/share/openclipart/{kind}" for kind in ("svg", "png"))
    said = {
        "described": "<dc:title>A Flask</dc:title><dc:description>with &amp;quot;bubbles&amp;quot;</dc:description>",
        "key_words_01": "<dc:title>unsorted</dc:title><rdf:li>glass</rdf:li><rdf:li>tool</rdf:li>"
        + "<rdf:li>glass</rdf:li>",
        "nameless": "",
    }
    for name, content in said.items():
        _write(drawings / f"a/{name}.svg", f"<svg>{content}</svg>")
        _picture(pictures / f"a/{name}.png")
    _picture(pictures / "a/without_drawing.png")
    captions = {Path(str(p.picture)).stem: p.caption for p in readers.openclipart(tmp_path, tmp_path)}
    assert captions == {
        "described": 'A Flask: with "bubbles"',
        "key_words_01": "key words, glass, tool",
        "nameless": "nameless",
    }


def test_figures_take_captions_then_alternative_text_then_headings(tmp_path: Path) -> None:
    html = """<html><body><h2>3.1. Drawing lines¶</h2>
      <p><img src="plain.png" alt="A straight line"></p> <p><img src="tool_line.png" alt="tool_line"><br>
      <div class="figure"><p class="title"><b>Figure 2.4. Two <i>lines</i></b></p>
        <div class="mediaobject"><img src="one.png" alt="x"><div class="caption"><p>before</p></div></div>
        <div class="mediaobject"><img src="two.png" alt="x"></div></div>
      <figure><img src="three.png"><figcaption>A &lt;b&gt;sketch</figcaption></figure>
      <div class="imageblock"><div class="content"><img src="four.png" alt="Fourth"></div></div>
      <img src="missing.png" alt="not there"><img src="one.svg" alt="a drawing">
      <p><img src="plain.png" alt="A straight line"></p></body></html>"""
    _write(tmp_path / "manual/page.html", html)
    for name in ("plain", "tool_line", "one", "two", "three", "four"):
        _picture(tmp_path / f"manual/{name}.png")
    found = {Path(str(p.picture)).stem: p.caption for p in readers.figures(tmp_path, "manual")}
    assert found == {
        "plain": "Drawing lines: A straight line",
        "tool_line": "Drawing lines: tool line",
        "one": "Two lines: before",
        "two": "Two lines",
        "three": "A sketch",
        "four": "Drawing lines: Fourth",
    }


def test_stamps_have_translations(tmp_path: Path) -> None:
    stamps = tmp_path / "usr/share/tuxpaint/stamps/animals"
    _picture(stamps / "frog.png")
    _write(stamps / "frog.txt", "A frog.\nde.utf8=Ein Frosch.\nxx.utf8=?\nfr.utf8=\n")
    _write(stamps / "no_picture.txt", "Nothing.")
    (pair,) = readers.tuxpaint_stamps(tmp_path)
    assert (pair.caption, pair.alt, dict(pair.translations)) == ("A frog.", "animals frog", {"German": "Ein Frosch."})


def test_emoji_are_joined_with_their_names(tmp_path: Path) -> None:
    entry = {"label": "hand", "hexcode": "1F44B", "tags": ["wave"]}
    dark = {"label": "hand: dark skin tone", "hexcode": "1F44B-1F3FF-FE0F"}
    _write(tmp_path / "package/en/data.json", json.dumps([{**entry, "skins": [dark]}, {"label": "x", "hexcode": "1F"}]))
    _write(tmp_path / "package/de/data.json", json.dumps([{"label": "Hand", "hexcode": "1F44B"}]))
    for code in ("1f44b", "1f44b-1f3ff"):
        _picture(tmp_path / f"package/assets/{code}.webp")
    hand, dark_hand = readers.fluent_emoji(tmp_path, tmp_path)
    assert (hand.caption, hand.alt, dict(hand.translations)) == ("an emoji of hand", "wave", {"German": "Hand"})
    assert dark_hand.caption == "an emoji of hand: dark skin tone"
    assert hand.group == dark_hand.group  # so that no shade of a held-out emoji is trained on


def test_units_are_described(tmp_path: Path) -> None:
    config = '[unit_type]\n name= _ "Boat"\n image="units/boat.png~RC(x)"\n description= _"Propelled by ""oars""."\n'
    _write(tmp_path / "data/core/units/boats/Boat.cfg", config)
    _write(tmp_path / "data/core/units/boats/Nameless.cfg", '[unit_type]\n image="units/boat.png"\n')
    _picture(tmp_path / "data/core/images/units/boat.png")
    (pair,) = readers.wesnoth_units(tmp_path)
    assert pair.caption == 'Boat: Propelled by "oars".'


def test_text_readers(tmp_path: Path) -> None:
    sentence = "This sentence is long enough to be kept as a paragraph of its own, and it says so."
    path = tmp_path / "usr/share/dictd/x.dict.dz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.write(f"Word \\W[o]rd\\, n. {sentence}\n   [1913 Webster]\n\nshort\n\n1 2 3 {'- ' * 40}\n")
    assert list(readers.dictionary(tmp_path)) == [[f"Word n. {sentence}"]]
    tagged = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` Nothing/pn at/in all/abn ''/'' ;/. ;/.\n"
    _write(tmp_path / "package/ca01", tagged)
    assert list(readers.brown_corpus(tmp_path)) == [['The jury said, "Nothing at all";']]
    _write(tmp_path / "pages/a.html", f"<body><p>{sentence[:40]}\n{sentence[40:]}</p><p>x</p><p>{sentence} &amp; more")
    assert list(readers.html_documents(tmp_path, "pages")) == [[sentence, f"{sentence} & more"]]
    line = '00001740 03 n 02 living_thing 0 entity 0 000 | a thing that is alive; "he lives"  \n'
    for part in ("noun", "verb", "adj", "adv"):
        _write(tmp_path / f"usr/share/wordnet/data.{part}", "  1 licence | text\n" + (line if part == "noun" else ""))
    assert list(readers.wordnet_entries(tmp_path)) == [("living thing", "a thing that is alive")]


def test_open_picture_names_what_is_wrong(tmp_path: Path) -> None:
    _picture(tmp_path / "small.png", (8, 400))
    _write(tmp_path / "text.png", "<html>")
    for name, reason in (("small.png", "image_too_small"), ("text.png", "unreadable"), ("none.png", "unreadable")):
        with pytest.raises(BadSample) as error:
            readers.open_picture(tmp_path / name)
        assert error.value.reason == reason
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    opened = readers.open_picture(tmp_path / "clear.png")
    assert opened.mode == "RGBA" and readers.on_white(opened).getpixel((0, 0)) == (255, 255, 255)
