"""Reads drawings with their descriptions: openclipart, the stamps of tuxpaint, the units of wesnoth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.recipes.real.readers.markup import one_line, spelled_out
from data_pipelines.recipes.real.readers.pictures import Pair


def read_openclipart(png: Path, svg: Path) -> Iterator[Pair]:
    """Clip art of openclipart (public domain); title, description and keywords are in the SVG file of the same name."""
    pictures, drawings = png / "usr/share/openclipart/png", svg / "usr/share/openclipart/svg"
    for path in sorted(pictures.rglob("*.png")):
        name = path.relative_to(pictures).with_suffix(".svg")
        try:
            source = (drawings / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        title, description = (_tag(source, tag) for tag in ("dc:title", "dc:description"))
        keywords = [one_line(word) for word in re.findall(r"<rdf:li[^>]*>([^<]+)<", source)]
        words = [word for word in [title or spelled_out(path.stem), *dict.fromkeys(keywords)] if word]
        caption = f"{title}: {description}" if title and description else ", ".join(words)
        if caption:
            yield Pair(path, caption, origin=f"openclipart/{name}", group=path.stem)


def _tag(source: str, tag: str) -> str:
    match = re.search(rf"<{tag}[^>]*>([^<]*)<", source)
    text = one_line(match[1]) if match else ""
    return "" if text.lower() in ("", "unsorted", "open clip art library") else text


_TUXPAINT_LANGUAGES = {
    "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pt": "Portuguese",
    "ru": "Russian", "pl": "Polish", "zh_cn": "Chinese", "ja": "Japanese",
}  # fmt: skip


def read_tuxpaint(root: Path) -> Iterator[Pair]:
    """Stamps of tuxpaint (GPL-2): cut-out pictures, each with one English sentence and its translations."""
    stamps = root / "usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.txt")):
        picture = path.with_suffix(".png")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if not picture.is_file() or not lines or not lines[0].strip():
            continue
        translations = {}
        for line in lines[1:]:
            language, _, text = line.partition(".utf8=")
            if language.lower() in _TUXPAINT_LANGUAGES and text.strip():
                translations[_TUXPAINT_LANGUAGES[language.lower()]] = text.strip()
        name = path.relative_to(stamps).with_suffix("")
        alt = " ".join([*name.parts[:-1], spelled_out(name.name)])
        yield Pair(picture, lines[0].strip(), alt, f"tuxpaint/{name}", name.name, translations)


def read_wesnoth(root: Path) -> Iterator[Pair]:
    """Units of the game wesnoth (GPL-2+) with the long descriptions from its encyclopedia."""
    for path in sorted(root.rglob("units/**/*.cfg")):
        source = path.read_text(encoding="utf-8", errors="replace")
        name, description = (_wml_text(source, key) for key in ("name", "description"))
        match = re.search(r'^\s*image="?([\w/.+-]+\.png)', source, re.MULTILINE)
        if not (name and description and match):
            continue
        places = [parent / "images" for parent in path.parents if (parent / "images").is_dir()]
        pictures = [place / match[1] for place in places if (place / match[1]).is_file()]
        if pictures:
            yield Pair(pictures[0], f"{name}: {description}", name, f"wesnoth/{path.stem}", path.stem)


def _wml_text(source: str, key: str) -> str:
    match = re.search(rf'^\s*{key}=\s*_\s*"((?:[^"]|"")*)"', source, re.MULTILINE)
    return one_line(match[1].replace('""', '"')) if match else ""
