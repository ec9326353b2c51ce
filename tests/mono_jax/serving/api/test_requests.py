"""Requests that cannot be served: each has a status and an error that names the problem."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.models.architecture import Architecture
from mono_jax.models.presets import preset
from mono_jax.serving.api.requests import images
from mono_jax.serving.api.requests.images import _SLICE
from mono_jax.serving.api.requests.prompts import Conversation, PromptMaker
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.contract import Closed, Event, Full
from mono_jax.weights.prompt_format import PromptFormat
from tests.mono_jax.serving.api.running_server import Client, image_part, message, picture, serving, wait_for
from tests.mono_jax.serving.api.scripted import Answering, ScriptedEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"role": "user", "content": "Hi"}


def image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def inline(data: bytes) -> dict[str, Any]:
    return {"messages": [message(data, "What?")]}


def chat(**parameters: Any) -> dict[str, Any]:
    return {"messages": [HI], **parameters}


def roles(*names: str) -> dict[str, Any]:
    return {"messages": [{"role": name, "content": "x"} for name in names]}


# path, body, param of the error, a part of its message
WRONG = [
    (CHAT, b"", None, ""),
    (CHAT, b"{", None, "not JSON"),
    (CHAT, b"\xff\xfe", None, ""),
    (CHAT, b"[]", None, ""),
    (CHAT, b"null", None, ""),
    (CHAT, b'{"messages": ' + b"[" * 3000, None, ""),
    (CHAT, {}, "messages", "required"),
    (CHAT, {"messages": []}, "messages", ""),
    (CHAT, {"messages": "Hi"}, "messages", ""),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", ""),
    (CHAT, {"messages": [HI | {"role": "robot"}]}, "messages.0.role", ""),
    (CHAT, {"messages": [HI | {"content": [{"type": "video"}]}]}, "messages.0.content.0", "video"),
    (CHAT, {"messages": [HI | {"content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
    (CHAT, {"messages": [HI | {"tool_calls": [{}]}]}, "messages.0.tool_calls", "does not support"),
    (CHAT, {"messages": [HI | {"Name": "x"}]}, "messages.0.Name", "did you mean 'name'"),
    (CHAT, {"messages": [HI | {"a[b]": 1}]}, "messages.0.a[b]", "unknown"),
    (
        CHAT,
        {"messages": [HI | {"content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
        "messages.0.content.0.cache_control",
        "unknown",
    ),
    (
        CHAT,
        {"messages": [HI | {"content": [{"type": "image_url", "image_url": {"url": 1}}]}]},
        "messages.0.content.0.image_url.url",
        "string",
    ),
    (CHAT, chat(Temperature=1), "Temperature", "did you mean 'temperature'"),
    (CHAT, chat(function_call=True), "function_call", "does not support"),
    (CHAT, roles("assistant"), "messages.0.role", "last message"),
    (CHAT, roles("user", "assistant"), "messages.1.role", "last message"),
    (CHAT, roles("user", "user"), "messages", "out of turn"),
    (CHAT, roles("assistant", "user"), "messages.0.role", "must begin with a user message"),
    (CHAT, roles("system", "assistant", "user"), "messages.1.role", "must begin with a user message"),
    (CHAT, roles("user", "system", "user"), "messages", "only the first"),
    (CHAT, roles("system"), "messages.0.role", "last message"),
    (CHAT, chat(temprature=1), "temprature", "did you mean 'temperature'"),
    (CHAT, chat(temperature="1"), "temperature", "number"),
    (CHAT, chat(temperature=-1), "temperature", "greater than or equal to 0"),
    (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}', "temperature", ""),
    (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "presence_penalty": Infinity}', "presence_penalty", ""),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "not JSON"),
    (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "stop": "\\udfff"}', None, "not JSON"),
    (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "\\ud800": 1}', None, "not JSON"),
    (CHAT, chat(top_p=0), "top_p", ""),
    (CHAT, chat(max_tokens=0), "max_tokens", ""),
    (CHAT, chat(max_tokens=True), "max_tokens", "integer"),
    (CHAT, chat(max_tokens=3_000_000_000), "max_tokens", "less than or equal to"),
    (CHAT, chat(max_completion_tokens=2**63), "max_completion_tokens", "less than or equal to"),
    (
        TEXT,
        {"prompt": "a", "max_tokens": 3 * 10**9, "echo": True, "logprobs": 1},
        "max_tokens",
        "less than or equal to",
    ),
    (CHAT, chat(stop="x" * 513), "stop", "512"),
    (CHAT, chat(n=0), "n", ""),
    (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "n": ' + b"9" * 4000 + b"}", "n", "less than"),
    (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "n": ' + b"9" * 5000 + b"}", None, "not JSON"),
    (CHAT, chat(n=129), "n", "at most 128"),
    (CHAT, chat(stop=["x"] * 17), "stop", ""),
    (CHAT, chat(stop=[1]), "stop.0", ""),
    (CHAT, chat(stream="yes"), "stream", ""),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "stream"),
    (CHAT, chat(top_logprobs=3), "top_logprobs", "logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", ""),
    (CHAT, chat(tools=[{"type": "function"}]), "tools", "does not support"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format", "does not support"),
    (CHAT, chat(logit_bias={"5": 1}), "logit_bias", "does not support"),
    (CHAT, chat(max_tokens=100_000), "messages", "max_length"),
    (CHAT, {"messages": [HI | {"content": "word " * 3000}]}, "messages", "max_length"),
    (CHAT, {"messages": [message("<image> here")]}, "messages.0", "1 <image> in the text, 0 images"),
    (CHAT, {"messages": [HI | {"content": "<image>"}]}, "messages.0", "0 images"),
    (CHAT, {"messages": [HI | {"content": "a <IMG_CONTEXT> b"}]}, "messages", "image_token_in_text"),
    (CHAT, {"messages": [{"role": "system", "content": [image_part(b"x")]}, HI]}, "messages.0", "user messages"),
    (CHAT, {"messages": [message(*[picture(0)] * 17)]}, "messages", "at most 16"),
    (CHAT, image("https://example.com/a.png"), "messages", "--image_urls"),
    (CHAT, image("file:///etc/passwd"), "messages", "data:image"),
    (CHAT, image("/etc/passwd"), "messages", "data:image"),
    (CHAT, image(""), "messages", "data:image"),
    (CHAT, image("data:image/png;base64,%%%"), "messages", "not base64"),
    (CHAT, image("data:image/png;base64,é"), "messages", "not base64"),
    (CHAT, image("data:image/png;base64,AAA"), "messages", "not base64"),
    (CHAT, image("data:image/png;base64,AA=A"), "messages", "not base64"),
    (CHAT, image(f"data:image/png;base64,{'A' * (_SLICE - 1)}=AAAA"), "messages", "not base64"),
    (CHAT, image(f"data:image/png;base64,{'A' * 2 * _SLICE}%"), "messages", "not base64"),
    (CHAT, image("data:image/png,abc"), "messages", "base64"),
    (CHAT, image("data:text/html;base64,aGk="), "messages", "data:image"),
    (CHAT, inline(b""), "messages", "image 1: 0 bytes"),
    (CHAT, inline(b"<html>"), "messages", "image 1: a file that begins with b'<html>' is not PNG"),
    (CHAT, inline(picture(0)[:200]), "messages", "image 1: truncated_image"),
    (
        CHAT,
        inline(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
        "messages",
        "SVG is not accepted",
    ),
    (CHAT, {"messages": [message(picture(0), b"x", "?")]}, "messages", "image 2: a file that begins with b'x' is"),
    (TEXT, {}, "prompt", "required"),
    (TEXT, {"prompt": []}, "prompt", ""),
    (TEXT, {"prompt": [[]]}, "prompt.0", ""),
    (TEXT, {"prompt": ["a", 1]}, "prompt.1", ""),
    (TEXT, {"prompt": [-1]}, "prompt.0", ""),
    (TEXT, {"prompt": [10**6]}, "prompt", "vocabulary"),
    (TEXT, {"prompt": ["a"] * 65, "n": 2}, "n", "at most 128"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "does not support"),
    (TEXT, {"prompt": "a", "best_of": True}, "best_of", "does not support"),
    (TEXT, {"prompt": [[5], [10**6]], "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt", "vocabulary"),
    (TEXT, {"prompt": [5] * 2000, "echo": True, "logprobs": 1, "max_tokens": 1}, "prompt", "max_length"),
    ("/tokenize", {"prompt": 1}, "prompt", ""),
    ("/detokenize", {"tokens": [10**6]}, "tokens", "vocabulary"),
]


@pytest.mark.parametrize(("path", "body", "param", "said"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(path: str, body: Any, param: str | None, said: str, stream: bool, client: Client):
    if stream and isinstance(body, dict) and path in (CHAT, TEXT) and "stream" not in body:
        body = body | {"stream": True}
    status, answer = client.post(path, body)
    if stream and param == "stream_options":
        assert status == 200  # then it is right
        return
    assert status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and said in error["message"], error
    assert len(error["message"]) < 400
    assert client.chat("Hi")[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [HI | {"content": [{"type": "x" * 900_000}]}]}),
        (CHAT, chat(model="x" * 900_000)),
        (CHAT, image("x" * 900_000)),
        ("/v1/" + "x" * 30_000, {}),
    ],
)
def test_errors_do_not_repeat_all_that_was_sent(path: str, body: Any, client: Client):
    status, answer = client.post(path, body)
    assert status in (400, 404) and len(answer["error"]["message"]) < 1000


def test_answers_can_be_sent_back_as_clients_hold_them(client: Client):
    """With every field that OpenAI's messages have, null or empty."""
    nothing = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    turns = [HI, {"role": "assistant", "content": "Hello.", **nothing}, HI]
    assert client.post(CHAT, {"messages": turns})[0] == 200


def test_pictures_are_taken_however_their_kind_is_spelled(client: Client):
    url = image_part(picture(0))["image_url"]["url"]
    head, _, data = url.partition(",")
    for spelled in (head, head.upper(), "data:;base64", "data:image/png;name=a.png;Base64"):
        assert client.post(CHAT, image(f"{spelled},{data}"))[0] == 200


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/scripted", "/metrics", "/openapi.json"])
def test_what_can_be_got_can_be_asked_for_its_head(path: str, client: Client):
    """As load balancers and monitors do."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    for asked, status in ((path, 200), ("/v1/nothing", 404), (path, 200)):
        connection.request("HEAD", asked)
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (status, b"")
    connection.close()


@pytest.mark.parametrize(
    "text", ["a\0b", "\ufffd\ufffe", "\U0010ffff", "\u202e", " ", "</s><s>", "<|im_end|>", "e\u0301" * 9]
)
def test_odd_texts_are_taken(text: str, client: Client):
    assert client.chat(text)[0] == client.post(TEXT, {"prompt": text, "echo": True, "logprobs": 1})[0] == 200
    assert client.post("/tokenize", {"prompt": text})[0] == 200


def test_statuses_that_are_not_400(client: Client, engine: ScriptedEngine):
    assert client.post(CHAT, chat(model="gpt-4"))[0] == 404
    assert client.get("/v1/models/gpt-4")[0] == 404
    status, answer = client.get("/v1/nothing")
    assert (status, answer["error"]["message"]) == (404, "GET /v1/nothing: Not Found")
    status, answer = client.get(CHAT)
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
    data = json.dumps(chat()).encode()
    for headers in ({"Content-Type": "text/plain"}, {}):  # which a page of another site can send without permission
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", CHAT, data, headers)
        reply = connection.getresponse()
        assert reply.status == 415 and "Content-Type: application/json" in json.load(reply)["error"]["message"]
        connection.close()
    engine.refuse = Full("256 requests wait")
    try:
        status, answer = client.post(CHAT, chat())
    finally:
        engine.refuse = None
    assert (status, answer["error"]["code"], client.headers["retry-after"]) == (429, "queue_full", "1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (TEXT, {"prompt": "Hi"})])
def test_of_several_answers_all_are_submitted_or_none(
    path: str, body: dict[str, Any], stream: bool, client: Client, engine: ScriptedEngine
):
    roomy, cancelled = engine.config, engine.ended.get("cancelled", 0)
    engine.hold()
    try:
        engine.config = dataclasses.replace(roomy, max_rows=1, max_queue=2)
        with ThreadPoolExecutor() as pool:
            other = pool.submit(client.chat, "Hi")
            wait_for(lambda: engine.under_way)
            assert client.post(path, body | {"n": 3, "stream": stream})[0] == 429
            wait_for(lambda: len(engine.under_way) == 1)  # the other's, but not two of the three
            engine.release()
            assert other.result()[0] == 200
            assert client.post(path, body | {"n": 3})[0] == 200
            engine.hold()
            status, answer = client.post(path, body | {"n": 4, "stream": stream})  # 429 would never end
            assert (status, answer["error"]["param"]) == (400, "n") and " at most" in answer["error"]["message"]
    finally:
        engine.config = roomy
        engine.release()
    assert engine.ended["cancelled"] == cancelled + 2


def test_an_engine_that_has_ended_is_told_from_a_full_one(client: Client, engine: ScriptedEngine):
    engine.refuse, engine.closed = Closed("out of memory"), "out of memory"
    try:
        status, answer = client.post(CHAT, chat())
        assert (status, answer["error"]["code"]) == (503, "engine_closed")
        health = client.get("/health")
        assert health[0] == 503 and health[1]["status"] == "failed"
        for said in (answer["error"]["message"], health[1]["reason"]):  # errors may name files and sizes
            assert "log" in said and "memory" not in said
    finally:
        engine.refuse = engine.closed = None


def test_an_answer_that_fails_is_logged_and_not_explained(
    client: Client, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(Answering, "step", lambda self: self._end(Event(finish="error", message="NaN in layer 3")))
    status, answer = client.post(CHAT, chat())
    [frame] = client.stream(CHAT, chat())
    assert status == 500
    for error in (answer["error"], frame["error"]):
        assert error["code"] == "generation_failed" and "NaN" not in error["message"]
    assert caplog.text.count("NaN in layer 3") == 2


def test_faults_of_the_server_say_so(client: Client, engine: ScriptedEngine):
    engine.refuse = ZeroDivisionError("inside")
    try:
        status, answer = client.post(CHAT, chat())
    finally:
        engine.refuse = None
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "inside" not in answer["error"]["message"]


def test_pixels_and_sides_are_limited(engine: ScriptedEngine):
    with serving(engine, ApiConfig(max_pixels=1000, drain_s=0)) as client:
        assert client.chat(picture(0, 30, 30), "?")[0] == 200
        status, answer = client.chat(picture(0, 40, 40), "?")
        assert status == 400 and "image_too_large (40x40; the limit is 1000)" in answer["error"]["message"]
        assert client.chat(picture(0, 1, 1), "?")[0] == 200  # users' own images; training leaves out spacer images


@pytest.mark.parametrize(
    ("kind", "always"),
    [(kind, True) for kind in ("png", "jpeg", "webp", "gif", "bmp")]
    + [(kind, False) for kind in ("tiff", "avif", "jpeg2000", "ico", "ppm", "tga", "pcx")],
)
def test_formats_whose_memory_is_unknown_are_taken_if_all_are(kind: str, always: bool, engine: ScriptedEngine):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, kind)
    with serving(engine) as client:
        status, answer = client.chat(file.getvalue(), "?")
        assert (status == 200) is always
        assert always or "--all_formats" in answer["error"]["message"]
    with serving(engine, ApiConfig(all_formats=True, drain_s=0)) as client:
        assert client.chat(file.getvalue(), "?")[0] == 200
        assert "image 1: not_an_image" in client.chat(b"<html>", "?")[1]["error"]["message"]


def test_images_are_resized_by_the_path_that_was_asked_for(engine: ScriptedEngine):
    pytest.importorskip("cykooz_resizer")
    seen = {}
    for path in ("exact", "fast"):
        prompts = PromptMaker(engine, ImageLimits(), path)
        prompt = prompts.chat(Conversation([("human", "<image>")], []), [("image 1", picture(0, 300, 200))])
        seen[path] = prompt.patches.astype(int)
    assert 0 < np.abs(seen["exact"] - seen["fast"]).max() < 64  # of noise


def test_models_without_images_or_template(chat_tokenizer: Tokenizer, small: Architecture, golden_dir: Path):
    text_only = preset("tiny_mono", vocab_size=chat_tokenizer.vocab_size, vision=None, visual_ffn_experts=False)
    engine = ScriptedEngine(chat_tokenizer, text_only)
    engine.start()
    with serving(engine) as client:
        assert client.chat("Hi")[0] == 200
        assert "takes no images" in client.chat(picture(0), "Hi")[1]["error"]["message"]
    engine.close()
    llama = Tokenizer(golden_dir / "chat_templates/llama3")  # which lacks the tokens of InternLM2's template
    for tokenizer, form in ((chat_tokenizer, PromptFormat(template="none")), (llama, PromptFormat())):
        engine = ScriptedEngine(tokenizer, small, form)
        engine.start()
        with serving(engine) as client:
            status, answer = client.chat("Hi")
            assert status == 400 and "/v1/completions" in answer["error"]["message"]
            assert client.post(TEXT, {"prompt": "Hi"})[0] == 200
        engine.close()


def test_a_data_uri_as_a_plain_string_is_taken(client: Client):
    url = f"data:image/png;base64,{base64.b64encode(picture(0)).decode()}"
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "?"}]
    as_object = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": "?"}]
    answers = [
        client.post(CHAT, {"messages": [HI | {"content": each}], "seed": 0})[1]["choices"]
        for each in (content, as_object)
    ]
    assert answers[0] == answers[1]


def test_images_are_decoded_in_their_own_threads(client: Client, monkeypatch: pytest.MonkeyPatch):
    """Not in the event loop, and in slices, between which other threads run."""
    seen = []

    def decode(text: str, **options: Any) -> bytes:
        seen.append((threading.current_thread().name.split("_")[0], len(text) <= _SLICE))
        return base64.b64decode(text, **options)

    monkeypatch.setattr(images, "base64", SimpleNamespace(b64decode=decode))
    assert client.chat(picture(0, 400, 400), picture(1), "?")[0] == 200
    assert len(seen) > 2 and set(seen) == {("images", True)}
