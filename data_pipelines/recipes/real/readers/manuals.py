"""Reads the figures of HTML manuals with their captions."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.recipes.real.readers.markup import one_line, spelled_out
from data_pipelines.recipes.real.readers.pictures import Pair


def read_figures(root: Path, folder: str) -> Iterator[Pair]:
    """Figures of an HTML manual with their captions; if there is none, the alternative text under its heading.

    It is used for the manuals of GIMP (GFDL-1.2+), KiCad (GPL-3+), scikit-image (BSD-3-Clause) and the Debian
    Administrator's Handbook (GPL-2+ or CC-BY-SA-3.0).
    """
    seen = set()
    for page in sorted((root / folder).rglob("*.html")):
        parser = _Figures()
        parser.feed(page.read_text(encoding="utf-8", errors="replace"))
        parser.close()
        for source, caption in parser.found:
            path = (page.parent / source.split("#")[0].split("?")[0]).resolve()
            is_picture = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif")
            if is_picture and (path, caption) not in seen and path.is_file():
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
            words = alt if known else spelled_out(Path(source).stem)
            heading = re.sub(r"^[\d.]+\s*", "", one_line("".join(self._heading)))
            parts = [heading, words]
        caption = ": ".join(dict.fromkeys(part for part in parts if part))
        if source and caption:
            self.found.append((source, caption))


@dataclasses.dataclass
class _Container:
    """An open figure: its own images, the captioned images of closed inner figures, and its caption so far."""

    images: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    done: list[tuple[tuple[str, str], list[str]]] = dataclasses.field(default_factory=list)
    caption: list[str] = dataclasses.field(default_factory=list)
