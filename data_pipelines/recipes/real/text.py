"""English text (S0): dictionaries, documentation, speeches and books."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from data_pipelines.recipes.parts import Counts
from data_pipelines.recipes.prose import write_documents
from data_pipelines.recipes.real.catalogue import HELDOUT, Options, Recipe
from data_pipelines.recipes.real.readers import english


def _text(read: Callable[..., Iterable[list[str]]]) -> Recipe:
    """Writes the documents of a reader; one in fifty (``HELDOUT``) is held out."""

    def write(options: Options, folder: Path, roots: list[Path]) -> Counts:
        documents = list(options.cut(read(*roots)))
        heldout = [document for number, document in enumerate(documents) if number % HELDOUT == HELDOUT - 1]
        train = [document for number, document in enumerate(documents) if number % HELDOUT != HELDOUT - 1]
        return {
            "documents": len(train),
            "bytes": write_documents(folder / "train.txt", train),
            "held-out bytes": write_documents(folder / "heldout.txt", heldout),
        }

    return write


def _pages(folder: str) -> Recipe:
    """The HTML pages of a folder in the first package."""
    return _text(lambda root, *_: english.read_html(root, folder))


def _files(pattern: str) -> Recipe:
    """The text files in a package that match a pattern."""
    return _text(lambda root: english.read_files(root, pattern))


RECIPES: dict[str, Recipe] = {
    "gcide": _text(english.read_dictionary),
    "foldoc": _text(english.read_dictionary),
    "linux_doc": _text(english.read_kernel_documents),
    "wordnet": _text(english.read_wordnet),
    "anarchism": _pages("usr/share/doc/anarchism/html"),
    "gimp_help": _pages("usr/share/gimp/2.0/help/en"),
    "brown": _text(english.read_brown_corpus),
    "sotu": _files("package/data/*.txt"),
    "moby_dick": _files("package/data/chapter_*.txt"),
}
