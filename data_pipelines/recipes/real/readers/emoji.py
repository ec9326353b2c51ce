"""Reads emoji with their names: the pictures of Fluent, the glyphs of Noto."""

from __future__ import annotations

import functools
import json
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from data_pipelines.recipes.real.readers.pictures import Pair

_EMOJI_LANGUAGES = {"zh": "Chinese", "de": "German", "fr": "French", "es": "Spanish", "ja": "Japanese", "ru": "Russian"}


def read_fluent(pictures: Path, data: Path) -> Iterator[Pair]:
    """Fluent emoji (MIT) of 256 pixels with their names in several languages, from emojibase (MIT)."""
    assets = {path.stem.replace("-fe0f", ""): path for path in sorted((pictures / "package/assets").glob("*.webp"))}
    names = {language: _emoji_names(data, code) for code, language in {"en": "English", **_EMOJI_LANGUAGES}.items()}
    for code, (label, tags) in names.pop("English").items():
        if code in assets:
            translations = {language: known[code][0] for language, known in names.items() if code in known}
            caption, alt, group = f"an emoji of {label}", " ".join(tags) or label, label.split(":")[0]
            yield Pair(assets[code], caption, alt, f"fluent-emoji/{code}", group, translations)


def _emoji_names(data: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    """Hexadecimal code -> (label, tags), including skin tones."""
    path = data / "package" / language / "data.json"
    names: dict[str, tuple[str, list[str]]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        for variant in (entry, *entry.get("skins", [])):
            code = variant["hexcode"].lower().replace("-fe0f", "")
            names[code] = (variant["label"], variant.get("tags") or entry.get("tags") or [])
    return names


def read_noto(noto: Path, cldr: Path) -> Iterator[Pair]:
    """Emoji drawn from the bitmaps of Noto (OFL-1.1) with names and keywords of the Unicode CLDR (Unicode-DFS-2016)."""
    file = next(noto.rglob("NotoColorEmoji.ttf"))
    font = ImageFont.truetype(str(file), 109)  # the only size of the bitmaps
    width = font.getlength("\N{GRINNING FACE}")
    for code, (label, keywords) in _cldr_names(cldr).items():
        if len(code) > 1 and not features.check("raqm"):
            continue  # without text shaping a sequence would be drawn as its parts
        if not _has_glyph(str(file), code) or font.getlength(code) != width:
            continue
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), code, font=font, embedded_color=True)
        box = image.getbbox()
        if box is not None:
            origin = "noto-emoji/" + "-".join(f"{ord(c):x}" for c in code)
            yield Pair(image.crop(box), f"an emoji of {label}", keywords, origin, label.split(":")[0])


@functools.cache
def _cmap(file: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    with TTFont(file, lazy=True) as font:
        return frozenset(font.getBestCmap())


def _has_glyph(file: str, code: str) -> bool:
    return all(ord(c) in _cmap(file) for c in code if c not in "\ufe0f\u200d") and not code.isascii()


def _cldr_names(cldr: Path) -> dict[str, tuple[str, str]]:
    names, keywords = {}, {}
    for folder in ("annotations", "annotationsDerived"):
        path = cldr / "usr/share/unicode/cldr/common" / folder / "en.xml"
        for entry in xml.etree.ElementTree.parse(path).iter("annotation"):
            target = names if entry.get("type") == "tts" else keywords
            target[entry.get("cp", "")] = " ".join((entry.text or "").replace("|", " ").split())
    return {code: (name, keywords.get(code, name)) for code, name in names.items()}
