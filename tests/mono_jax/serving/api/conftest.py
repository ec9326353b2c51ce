"""A server with a scripted engine, one for each test file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.models.architecture import Architecture
from tests.mono_jax.serving.api.scripted import ScriptedEngine
from tests.tiny_folder import tiny_config

if TYPE_CHECKING:
    from tests.mono_jax.serving.api.running_server import Client


@pytest.fixture(scope="session")
def chat_tokenizer(golden_dir: Path) -> Tokenizer:
    return Tokenizer(golden_dir / "chat")


@pytest.fixture(scope="session")
def small(chat_tokenizer: Tokenizer) -> Architecture:
    return tiny_config(chat_tokenizer)


@pytest.fixture(scope="module")
def engine(chat_tokenizer: Tokenizer, small: Architecture) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(chat_tokenizer, small)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[Client]:
    from tests.mono_jax.serving.api.running_server import serving

    with serving(engine) as client:
        yield client
