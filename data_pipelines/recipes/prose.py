"""English prose from the docstrings of installed packages, and the text files to which documents are written.

A fresh virtual environment holds megabytes of written English: the docstrings of Python and of the numerical packages
(PSF, BSD and Apache licences). Paragraphs that read like sentences are kept, each once; a module is a document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sklearn", "skimage", "networkx", "matplotlib", "jax", "flax", "optax", "PIL")

_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]*?)(?:\s*<[^>`]*>)?`")
_HEADING = re.compile(r"^(?:Args|Returns?|Notes?|Raises|Examples?|Yields|Warning|See also|\.\. \w+:):\s+")
_SENTENCE_WORD = re.compile(r"[(\"']?[A-Za-z][a-z]*(?:[-'][a-z]+)*[)\"']?[.,;:!?]?[)\"']?$")
_CODE = re.compile(r"---|===|>>>|::| : |\bArgs:|Parameters|References|https?:|[{}\\|\[\]]|\w_\w")
_PARAGRAPH_END = re.compile(r"\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Document:
    """Paragraphs of one file, in order; ``name`` is its path within the package, the same on every machine."""

    name: str
    paragraphs: tuple[str, ...]

    def is_heldout(self) -> bool:
        """True for one in twenty documents, chosen by name."""
        return hashlib.blake2b(self.name.encode(), digest_size=8).digest()[0] % 20 == 0


def clean_paragraph(text: str) -> str | None:
    """The paragraph on one line without markup, or None if it does not read like English sentences."""
    text = _ROLE.sub(r"\1", text).replace("`", "").replace("*", "")
    text = _HEADING.sub("", " ".join(text.split()))
    if len(text) < 80 or not text.isascii() or not text[0].isupper() or text[-1] not in ".!?" or _CODE.search(text):
        return None
    words = text.split()
    sentence_like = sum(1 for word in words if _SENTENCE_WORD.match(word))
    return text if len(words) >= 12 and sentence_like >= 0.85 * len(words) else None


def documents(packages: Iterable[str] = PACKAGES) -> Iterator[Document]:
    """Documents of Python itself and of the ``packages`` that are installed; no paragraph occurs twice."""
    seen: set[str] = set()
    for name, texts in _texts(packages):
        paragraphs = []
        for text in texts:
            for raw in _PARAGRAPH_END.split(text):
                paragraph = clean_paragraph(raw)
                if paragraph is not None and paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
        if paragraphs:
            yield Document(name, tuple(paragraphs))


def _texts(packages: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics  # the language reference that `help()` shows

    for topic in sorted(topics):
        yield f"pydoc/{topic}", [topics[topic]]
    yield from _module_texts("python", Path(sysconfig.get_path("stdlib")))
    for package in packages:
        spec = importlib.util.find_spec(package)  # finds without importing
        if spec is not None and spec.origin is not None:
            yield from _module_texts(package, Path(spec.origin).parent)


def _module_texts(package: str, root: Path) -> Iterator[tuple[str, list[str]]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in ("site-packages", "dist-packages") or part.startswith(("test", "_vendor")) for part in parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        yield f"{package}/{'/'.join(parts)}", _DOCSTRING.findall(source)


def write_documents(path: Path, documents: Iterable[Sequence[str]], limit: int | None = None) -> int:
    """Writes whole documents (sequences of paragraphs), up to ``limit`` bytes in total; returns the bytes written.

    One paragraph per line, a blank line after each document. The first document is written whatever its length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("wb") as file:
        for paragraphs in documents:
            text = ("\n".join(paragraphs) + "\n\n").encode()
            if limit is None or not written or written + len(text) <= limit:
                written += file.write(text)
    return written
