"""Reads what packages hold: pictures with what is said of them, and English text.

Each reader takes the folders of its unpacked packages and yields in a fixed order. Nothing here fetches or writes.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import html
import html.parser
import json
import re
import warnings
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from data_pipelines.errors import BadSample
from data_pipelines.recipes.demo import prose

MAX_PIXELS = 50_000_000
MIN_EDGE = 32  # smaller pictures are buttons and bullets

Document = list[str]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A picture (file or image) and what is said of it.

    Attributes:
      caption: the best description there is.
      alt: a poorer one, as web pages carry it; empty = the caption serves.
      group: pictures of one group fall on the same side of the held-out split.
      translations: the caption in other languages, by English name of the language.
    """

    picture: Path | Image.Image
    caption: str
    alt: str = ""
    origin: str = ""
    group: str = ""
    translations: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_picture(picture: Path | Image.Image) -> Image.Image:
    """The picture in RGB or, where it has transparency, RGBA.

    Raises BadSample: "unreadable", "image_too_large", "image_too_small".
    """
    if isinstance(picture, Image.Image):
        return picture
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # looked at below
            file = Image.open(picture)
        with file as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("image_too_large", picture.name, f"{image.width}x{image.height}")
            if min(image.size) < MIN_EDGE:
                raise BadSample("image_too_small", picture.name, f"{image.width}x{image.height}")
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("unreadable", picture.name, str(error)) from None


def on_white(image: Image.Image) -> Image.Image:
    """RGB with transparency laid on white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def one_line(text: str) -> str:
    """Without tags, entities, line breaks and the marks of links to headings."""
    return " ".join(re.sub(r"<[^<>]*>", " ", html.unescape(html.unescape(text))).replace("¶", "").split())


# Pictures -------------------------------------------------------------------------------------------------------------


def openclipart(png: Path, svg: Path) -> Iterator[Pair]:
    """Clip art; title, description and keywords stand in the SVG file of the same name."""
    pictures, drawings = png / "usr/share/openclipart/png", svg / "usr/share/openclipart/svg"
    for path in sorted(pictures.rglob("*.png")):
        name = path.relative_to(pictures).with_suffix(".svg")
        try:
            source = (drawings / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        title, description = (_tag(source, tag) for tag in ("dc:title", "dc:description"))
        keywords = [one_line(word) for word in re.findall(r"<rdf:li[^>]*>([^<]+)<", source)]
        words = [word for word in [title or _spelled_out(path.stem), *dict.fromkeys(keywords)] if word]
        caption = f"{title}: {description}" if title and description else ", ".join(words)
        if caption:
            yield Pair(path, caption, origin=f"openclipart/{name}", group=path.stem)


def _tag(source: str, tag: str) -> str:
    match = re.search(rf"<{tag}[^>]*>([^<]*)<", source)
    text = one_line(match[1]) if match else ""
    return "" if text.lower() in ("", "unsorted", "open clip art library") else text


def _spelled_out(stem: str) -> str:
    return " ".join(word for word in re.split(r"[\W_]+", stem) if not word.isdigit())


def figures(root: Path, folder: str) -> Iterator[Pair]:
    """Figures of an HTML manual with their captions; where there is none, the alternative text under its heading."""
    seen = set()
    base = root / folder
    for page in sorted(base.rglob("*.html")):
        parser = _Figures()
        parser.feed(page.read_text(encoding="utf-8", errors="replace"))
        parser.close()
        for source, caption in parser.found:
            path = (page.parent / source.split("#")[0].split("?")[0]).resolve()
            if (
                path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif")
                and (path, caption) not in seen
                and path.is_file()
            ):
                seen.add((path, caption))
                yield Pair(path, caption, origin=f"{folder}/{source}", group=path.stem)


class _Figures(html.parser.HTMLParser):
    """Collects (source, caption) of every image of a page in ``found``."""

    _VOID = frozenset(("img", "br", "hr", "input", "meta", "link", "col", "area", "base", "source", "wbr", "embed"))
    _CONTAINER = re.compile(r"\b(figure|informalfigure|imageblock|mediaobject)\b")
    _CAPTION = re.compile(r"\b(title|caption)\b")
    _NUMBER = re.compile(r"^(?:Figure|Fig\.)\s*[\w.]*?\d[\w.]*[.:]?\s*")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._open: list[tuple[str, str]] = []  # (tag, role)
        self._containers: list[_Container] = []
        self._heading: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        if tag == "img":
            image = (values.get("src", ""), values.get("alt", ""))
            if self._containers:
                self._containers[-1].images.append(image)
            else:
                self._add(*image, [])
        if tag in self._VOID:
            return
        classes = values.get("class", "")
        role = ""
        if tag == "figure" or (tag == "div" and self._CONTAINER.search(classes)):
            role = "container"
            self._containers.append(_Container())
        elif tag == "figcaption" or (self._containers and self._CAPTION.search(classes)):
            role = "caption"
        elif tag in ("h1", "h2", "h3", "h4"):
            role = "heading"
            self._heading = []
        self._open.append((tag, role))

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _ in self._open):
            return
        while self._open:
            name, role = self._open.pop()
            if role == "container":
                self._close_container()
            if name == tag:
                return

    def close(self) -> None:
        super().close()
        while self._containers:
            self._close_container()

    def handle_data(self, data: str) -> None:
        roles = [role for _, role in self._open]
        if "caption" in roles and self._containers:
            self._containers[-1].caption.append(data)
        elif "heading" in roles:
            self._heading.append(data)

    def _close_container(self) -> None:
        closed = self._containers.pop()
        caption = one_line("".join(closed.caption))
        done = [(image, [caption, *inner]) for image, inner in closed.done] + [(i, [caption]) for i in closed.images]
        if self._containers:
            self._containers[-1].done += done
        else:
            for image, captions in done:
                self._add(*image, captions)

    def _add(self, source: str, alt: str, captions: list[str]) -> None:
        parts = [self._NUMBER.sub("", part) for part in captions]
        alt = one_line(alt)
        if not any(parts):
            known = alt and alt != Path(source).stem
            words = alt if known else _spelled_out(Path(source).stem)
            heading = re.sub(r"^[\d.]+\s*", "", one_line("".join(self._heading)))
            parts = [heading, words]
        caption = ": ".join(dict.fromkeys(part for part in parts if part))
        if source and caption:
            self.found.append((source, caption))


@dataclasses.dataclass
class _Container:
    """An open figure: its own images, those of closed inner figures with their captions, and its caption so far."""

    images: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    done: list[tuple[tuple[str, str], list[str]]] = dataclasses.field(default_factory=list)
    caption: list[str] = dataclasses.field(default_factory=list)


_TUXPAINT_LANGUAGES = {
    "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pt": "Portuguese",
    "ru": "Russian", "pl": "Polish", "zh_cn": "Chinese", "ja": "Japanese",
}  # fmt: skip


def tuxpaint_stamps(root: Path) -> Iterator[Pair]:
    """Cut-out pictures; the text beside each holds one sentence in English and its translations."""
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
        alt = " ".join([*name.parts[:-1], _spelled_out(name.name)])
        yield Pair(picture, lines[0].strip(), alt, f"tuxpaint/{name}", name.name, translations)


_EMOJI_LANGUAGES = {"zh": "Chinese", "de": "German", "fr": "French", "es": "Spanish", "ja": "Japanese", "ru": "Russian"}


def fluent_emoji(pictures: Path, data: Path) -> Iterator[Pair]:
    """Emoji of 256 pixels with their names in several languages."""
    assets = {path.stem.replace("-fe0f", ""): path for path in sorted((pictures / "package/assets").glob("*.webp"))}
    names = {language: _emoji_names(data, code) for code, language in {"en": "English", **_EMOJI_LANGUAGES}.items()}
    for code, (label, tags) in names.pop("English").items():
        if code in assets:
            translations = {language: known[code][0] for language, known in names.items() if code in known}
            caption = f"an emoji of {label}"
            alt = " ".join(tags) or label
            yield Pair(assets[code], caption, alt, f"fluent-emoji/{code}", label.split(":")[0], translations)


def _emoji_names(data: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    """Hexadecimal code -> (label, tags), skin tones included."""
    path = data / "package" / language / "data.json"
    names: dict[str, tuple[str, list[str]]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        for variant in (entry, *entry.get("skins", [])):
            code = variant["hexcode"].lower().replace("-fe0f", "")
            names[code] = (variant["label"], variant.get("tags") or entry.get("tags") or [])
    return names


def noto_emoji(font: Path, cldr: Path) -> Iterator[Pair]:
    """Emoji drawn from the font's bitmaps with the names and keywords of the Unicode CLDR."""
    file = next(font.rglob("NotoColorEmoji.ttf"))
    face = ImageFont.truetype(str(file), 109)  # the one size that the bitmaps have
    width = face.getlength("\N{GRINNING FACE}")
    for code, (label, keywords) in _cldr_names(cldr).items():
        if len(code) > 1 and not features.check("raqm"):
            continue  # without text shaping a sequence would be drawn as its parts
        if not _has_glyph(str(file), code) or face.getlength(code) != width:
            continue
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), code, font=face, embedded_color=True)
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


def wesnoth_units(root: Path) -> Iterator[Pair]:
    """Units of a game with the long descriptions of its encyclopedia."""
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


def easy_vqa(root: Path, split: str) -> list[tuple[Path, list[tuple[str, str]]]]:
    """(image, [(question, answer), ...]) of every image of the "train" or "test" split."""
    folder = root / "easy_vqa/data" / split
    turns: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        turns.setdefault(image, []).append((question, answer))
    return [(folder / f"images/{image}.png", asked) for image, asked in sorted(turns.items())]


# Text -----------------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> Document:
    """Paragraphs on one line each that are mostly words."""
    kept = []
    for raw in re.split(r"\n\s*\n", text):
        paragraph = " ".join(raw.split())
        letters = sum(1 for c in paragraph if c.isalpha() or c in " ,.;'")
        if len(paragraph) >= 60 and letters >= 0.85 * len(paragraph):
            kept.append(paragraph)
    return kept


def text_files(root: Path, pattern: str) -> Iterator[Document]:
    """One document per file."""
    for path in sorted(root.glob(pattern)):
        if found := paragraphs(path.read_text(encoding="utf-8", errors="replace")):
            yield found


def dictionary(root: Path) -> Iterator[Document]:
    """A dictd database; a hundred paragraphs a document, without marks of origin and pronunciation."""
    with gzip.open(next(root.glob("usr/share/dictd/*.dict.dz")), "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    text = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^\]]*|Webster[^\]]*)[^\]]*\]|\\[^\\\n]*\\,?|[{}<>]", "", text)
    found = paragraphs(text)
    for start in range(0, len(found), 100):
        yield found[start : start + 100]


def wordnet_entries(root: Path) -> Iterator[tuple[str, str]]:
    """(word, definition) of every sense."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text(encoding="latin-1").splitlines():
            fields, bar, gloss = line.partition("|")
            if bar and not line.startswith(" "):
                yield fields.split()[4].split("(")[0].replace("_", " "), gloss.split('; "')[0].strip()


def wordnet(root: Path) -> Iterator[Document]:
    entries = [f"{word}: {gloss}" for word, gloss in wordnet_entries(root) if len(gloss) >= 20]
    for start in range(0, len(entries), 100):
        yield entries[start : start + 100]


def kernel_documents(root: Path) -> Iterator[Document]:
    """Documentation of the Linux kernel: the paragraphs that read like sentences."""
    for path in sorted(root.rglob("*.gz")):
        if path.name.endswith((".rst.gz", ".txt.gz")):
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
                found = [prose.clean_paragraph(raw) for raw in re.split(r"\n\s*\n", file.read())]
            if kept := [paragraph for paragraph in found if paragraph is not None]:
                yield kept


def html_documents(root: Path, folder: str) -> Iterator[Document]:
    """The paragraphs of HTML pages, one document per page."""
    for path in sorted((root / folder).rglob("*.html")):
        source = path.read_text(encoding="utf-8", errors="replace")
        raw = re.findall(r"<p[ >].*?(?=</p>|<p[ >]|</body|\Z)", source, re.DOTALL | re.IGNORECASE)
        if found := paragraphs("\n\n".join(one_line(text) for text in raw)):
            yield found


def brown_corpus(root: Path) -> Iterator[Document]:
    """The Brown corpus without its word classes, punctuation set as in print."""
    for path in sorted((root / "package").glob("c???")):
        kept = []
        for raw in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            words = " ".join(token.rsplit("/", 1)[0] for token in raw.split())
            words = re.sub(r"\s+([.,;:!?)]|'')", r"\1", re.sub(r"(``|\()\s+", r"\1", words))
            words = re.sub(r"([;:!?])\1", r"\1", words.replace("``", '"').replace("''", '"'))
            if len(words) >= 20:
                kept.append(words)
        if kept:
            yield kept
