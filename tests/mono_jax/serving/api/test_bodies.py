"""Bodies are parsed in little memory, whatever they contain: lists are bounded and end at the first fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

from pydantic import ValidationError

from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.requests import parsing
from mono_jax.serving.api.requests.schemas import Body, ChatRequest, CompletionRequest, Message
from tests.mono_jax.serving.api.running_server import Client

MANY = 300_000


def schemas(parent: type[Body] = Body) -> Iterator[type[Body]]:
    for schema in parent.__subclasses__():
        yield schema
        yield from schemas(schema)


def arrays(schema: Any) -> Iterator[dict[str, Any]]:
    """All lists in a part of a JSON schema."""
    if isinstance(schema, dict):
        if schema.get("type") == "array":
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from arrays(part)


LISTS = [
    (schema, name)
    for schema in schemas()
    for name, field in schema.model_json_schema()["properties"].items()
    if next(arrays(field), None)
]


def test_the_table_has_them_all():
    assert {(Message, "content"), (ChatRequest, "messages"), (CompletionRequest, "prompt")} <= set(LISTS)


@pytest.mark.parametrize(("schema", "name"), LISTS)
def test_every_list_has_a_bound_and_few_faults(schema: type[Body], name: str):
    for array in arrays(schema.model_json_schema()):
        assert array["maxItems"] <= 1_000_000, array
    for wrong in (*([each] * MANY for each in (1.5, {}, [], "a" * 1000, -1)), [1] * MANY + [1.5]):
        with pytest.raises(ValidationError) as error:
            schema.model_validate({name: wrong})
        assert len([fault for fault in error.value.errors() if fault["loc"][0] == name]) <= 8


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1] * MANY + [1.5]}),
        ("/v1/completions", {"prompt": [[1.5]] * MANY}),
        ("/v1/completions", {"prompt": "a", "stop": ["a"] * MANY}),
        ("/v1/chat/completions", {"messages": [{}] * MANY}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 300}] * 300},
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "metadata": [[]] * 2**20}),
        ("/detokenize", {"tokens": [-1] * MANY}),
    ],
)
def test_large_bodies_are_parsed_beside_the_loop(path: str, body: Any, client: Client, monkeypatch: pytest.MonkeyPatch):
    threads, parse = [], parsing.parse
    monkeypatch.setattr(parsing, "parse", lambda *a: (threads.append(threading.current_thread().name), parse(*a))[1])
    status, answer = client.post(path, body)
    assert status == 400 and len(answer["error"]["message"]) < 300, answer
    assert client.chat("Hi")[0] == 200
    assert [name.startswith("texts") for name in threads] == [True, False]


def test_values_are_counted_before_they_are_made():
    for text in (b"[],", b"{},", b"1,"):
        with pytest.raises(ApiError, match="more than 1048576 values"):
            parsing.parse(b"[" + text * 2**20 + b"1]", ChatRequest)


def test_the_bytes_are_not_kept(client: Client, monkeypatch: pytest.MonkeyPatch):
    """FastAPI would hold them until the answer has ended."""
    seen, answer = [], parsing._Parsing.json

    async def json_(self: Any) -> Any:
        found = await answer(self)
        seen.append(self._data)
        return found

    monkeypatch.setattr(parsing._Parsing, "json", json_)
    assert client.chat("Hi", user="x" * 400_000)[0] == 200
    assert seen == [b""]
