"""The package easy-vqa, as it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.recipes.easy_vqa import read_easy_vqa

easy_vqa = pytest.importorskip("easy_vqa")


def test_questions_are_joined_with_their_images() -> None:
    for split in ("train", "test"):
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        triples = list(zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True))
        images = read_easy_vqa(Path(easy_vqa.__file__).parents[1], split)
        assert sum(len(turns) for _, turns in images) == len(triples) > 0
        number, (path, turns) = next((int(path.stem), (path, turns)) for path, turns in images if len(turns) > 1)
        assert turns == [(question, answer) for question, answer, image in triples if image == number]
        assert path.is_file() and path.samefile(paths[number])
