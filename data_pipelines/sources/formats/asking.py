"""Requesting the files of single samples while a shard is indexed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data_pipelines.errors import BadSample, StorageError
from data_pipelines.io.storage import Questions
from data_pipelines.sources.indices.shard_index import UNASKED

T = TypeVar("T")


def ask(questions: Questions, read: Callable[[], T], missing: str, host: str = "") -> T:
    """The result of ``read``; ``host``: see ``Questions.ask``.

    Raises BadSample ``missing`` if storage says that there is no such file, BadSample ``UNASKED`` if it does not answer
    for this file, and StorageError if it does not answer at all.
    """
    try:
        return questions.ask(read, host)
    except ValueError as error:  # a NUL character in the path
        raise BadSample(missing, detail=str(error)) from None
    except StorageError as error:
        if error.exhausted:
            raise
        raise BadSample(missing if error.missing else UNASKED, detail=str(error)) from None
