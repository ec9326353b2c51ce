"""Training a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.recipes.tokenizer import train_tokenizer


def test_too_few_sentences_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^vocabulary=1024: the tokenizer cannot be trained \("):
        train_tokenizer(tmp_path, ["a few words"], 1024)
