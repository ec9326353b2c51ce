"""Prose from docstrings: sentences in, code and tables out."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.recipes import prose

SENTENCE = "This method modifies the image in place, and it has no effect where the image has been loaded before."


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (SENTENCE, SENTENCE),
        (SENTENCE.replace("image in", "*image*\n    in"), SENTENCE),
        ("Note: " + SENTENCE.replace("method", ":meth:`~pkg.method`"), SENTENCE.replace("method", "pkg.method")),
        ("Returns: " + SENTENCE, SENTENCE),
        (SENTENCE[:60], None),  # too short to be a paragraph
        (SENTENCE[:-1], None),  # no end
        (SENTENCE.replace("image", "raw_image"), None),
        ("Parameters ---------- x : array The array that is to be looked at by this function, as it was given.", None),
        (SENTENCE.replace("method", "méthode"), None),
        (
            "x = 1 + 2 + 3 * 4 / 5 - 6 ** 7 // 8 % 9 and 10 or 11 if 12 else 13 + 14 + 15 - 16 - 17 - 18 + 19 x 20.",
            None,
        ),
    ],
)
def test_clean_paragraph(raw: str, clean: str | None) -> None:
    assert prose.clean_paragraph(raw) == clean


def test_documents_are_real_unique_and_split_by_name() -> None:
    documents = list(prose.documents(packages=("PIL", "no_such_package")))
    paragraphs = [p for d in documents for p in d.paragraphs]
    assert sum(map(len, paragraphs)) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert len({d.name for d in documents}) == len(documents)
    assert not any("/root" in d.name or d.name.startswith("/") for d in documents)
    assert 0 < sum(d.is_heldout() for d in documents) < len(documents) / 8


def test_whole_documents_are_written_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "text/train.txt"
    assert prose.write_documents(path, [["a long paragraph", "b"], ["too long"], ["c"]], limit=23) == 23
    assert path.read_text() == "a long paragraph\nb\n\nc\n\n"
    assert prose.write_documents(path, [["a long paragraph", "b"]], limit=1) == 20  # the first one always
