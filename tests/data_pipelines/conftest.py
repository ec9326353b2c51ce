from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.io import storage
from data_pipelines.records import extra_formats
from tests.made_sets import picture, write_conversations, write_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 image-text pairs, two of the images broken."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 130, broken=(7, 50))
    return folder


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with none, one and two images."""
    folder, rng = tmp_path_factory.mktemp("talks"), np.random.default_rng(1)
    records = []
    for number in range(40):
        names = [f"{number}_{k}.png" for k in range(number % 3)]
        for name in names:
            (folder / name).write_bytes(picture(rng, 60, 40, "PNG"))
        question = "which?" + " <image>" * len(names)
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {number}"}] * (1 + number % 2)
        if number % 2:
            said = [said[0], said[1], {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": number, "conversations": said, **({"image": names} if names else {})})
    write_conversations(folder / "talks.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where token counts and plans are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that does not answer is neither retried nor waited for, unless a test says so."""
    monkeypatch.setattr(storage, "_patience", storage.Patience(retries=0))


@pytest.fixture
def no_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra "video" is not installed."""
    package = extra_formats._package
    monkeypatch.setattr(extra_formats, "_package", lambda kind: None if kind == "video" else package(kind))
