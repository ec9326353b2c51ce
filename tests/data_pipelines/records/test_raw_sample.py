"""Texts of samples: captions, conversations and plain text."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import BadSample
from data_pipelines.records.layouts import parse
from data_pipelines.records.raw_sample import Form, RawSample


@pytest.mark.parametrize(
    ("form", "data", "expected"),
    [
        (Form.CAPTION, b"\xef\xbb\xbfa caption", RawSample(caption="a caption")),
        (Form.TEXT, b"words", RawSample(text="words")),
        (Form.JSON, {"caption": "c", "image": "x.jpg"}, RawSample(caption="c", image_refs=("x.jpg",))),
        (Form.JSON, {"text": "t"}, RawSample(text="t")),
        (
            Form.JSON,
            [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
            RawSample(conversations=(("human", "?"), ("gpt", "!"))),
        ),
    ],
)
def test_texts(form: Form, data: object, expected: RawSample) -> None:
    assert parse(form, data if isinstance(data, bytes) else json.dumps(data).encode()) == expected


@pytest.mark.parametrize(
    ("form", "data", "reason"),
    [
        (Form.NONE, b"", "no_caption"),
        (Form.CAPTION, b" \n", "no_caption"),
        (Form.CAPTION, b"\xe9", "caption_not_utf8"),
        (Form.TEXT, b"\xe9", "text_not_utf8"),
        (Form.TEXT, b"", "empty_text"),
        (Form.JSON, b"[1]", "broken_json"),
        (Form.JSON, b"[" * 10_000, "broken_json"),
        (Form.JSON, b'{"caption": "\\ud800"}', "caption_not_utf8"),
        (Form.JSON, b'{"image": 5, "caption": "c"}', "bad_image_field"),
        (Form.JSON, b'{"conversations": [{"from": "cat", "value": "meow"}]}', "bad_conversation"),
        (Form.JSON, b'{"conversations": []}', "bad_conversation"),
        (Form.JSON, b'{"messages": [{"role": "user", "content": "?"}]}', "nothing_to_train"),
    ],
)
def test_bad_texts(form: Form, data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as error:
        parse(form, data)
    assert error.value.reason == reason


def test_content_is_the_whole_text() -> None:
    assert RawSample(conversations=(("human", "a"), ("gpt", "b"))).content == "a\nb"
    assert (RawSample(caption="c").content, RawSample(text="t").content, RawSample().content) == ("c", "t", "")
