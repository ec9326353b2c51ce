"""Figures of HTML manuals."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.recipes.real.readers.manuals import read_figures
from tests.data_pipelines.recipes.real.readers.package_files import write_picture, write_text


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
    write_text(tmp_path / "manual/page.html", html)
    for name in ("plain", "tool_line", "one", "two", "three", "four"):
        write_picture(tmp_path / f"manual/{name}.png")
    found = {Path(str(p.picture)).stem: p.caption for p in read_figures(tmp_path, "manual")}
    assert found == {
        "plain": "Drawing lines: A straight line",
        "tool_line": "Drawing lines: tool line",
        "one": "Two lines: before",
        "two": "Two lines",
        "three": "A sketch",
        "four": "Drawing lines: Fourth",
    }
