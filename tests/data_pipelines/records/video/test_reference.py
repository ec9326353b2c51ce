"""Videos in records of public layouts, their marks, and the lines of their frames. PyAV is not needed for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats
from data_pipelines.records.layouts import Reading, from_record
from data_pipelines.records.raw_sample import RawSample, Video
from data_pipelines.records.video.reference import with_frames, without_frames

READS = Reading(videos=0)
A, B = Video("a.mp4"), Video("b.mp4")


@pytest.fixture(autouse=True)
def pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is installed."""
    monkeypatch.setattr(extra_formats, "_package", lambda kind: object())


def asked(question: Any, **record: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "noise"}], **record}


PART = {"type": "video", "video": "a.mp4", "fps": 2.0}
TEXT = {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("record", "question", "refs"),
    [
        (asked("<video>\nwhat?", video="a.mp4"), "<image>\nwhat?", (A,)),  # InternVL
        (asked("what?", video="a.mp4"), "<image>\nwhat?", (A,)),
        (asked("<image>\nwhat?", video="a.mp4"), "<image>\nwhat?", (A,)),  # LLaVA-Video
        (asked("<video> or <video>?", videos=["a.mp4", "b.mp4"]), "<image> or <image>?", (A, B)),
        (asked("what?", videos=["a.mp4", "b.mp4"]), "<image>\n<image>\nwhat?", (A, B)),
        (asked("<video> like <image>?", video="a.mp4", image="c.jpg"), "<image> like <image>?", (A, "c.jpg")),
        (asked("<image> like <video>?", video="a.mp4", image="c.jpg"), "<image> like <image>?", ("c.jpg", A)),
        (asked("what?", video="a.mp4", image="c.jpg"), "<image>\n<image>\nwhat?", ("c.jpg", A)),
        (asked("<video>\nwhat?", video="a.mp4", clip=[0.5, 3]), "<image>\nwhat?", (Video("a.mp4", 0.5, 3.0),)),
        (
            asked("what?", video="a.mp4", clip=None, start_time=1, end_time=2.5),
            "<image>\nwhat?",
            (Video("a.mp4", 1, 2.5),),
        ),
        (asked([PART, TEXT]), "<image>\nwhat?", (A,)),
        (asked([TEXT, PART | {"video_start": 2, "video_end": 4}]), "what?\n<image>", (Video("a.mp4", 2.0, 4.0),)),
        (asked([{"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT]), "<image>\nwhat?", (A,)),
        (asked([{"type": "video"}, TEXT], videos=["a.mp4"]), "<image>\nwhat?", (A,)),
        (asked([PART, {"type": "image", "image": "c.jpg"}, TEXT]), "<image>\n<image>\nwhat?", (A, "c.jpg")),
        (asked("what?", video=b"held"), "<image>\nwhat?", (Video(b"held"),)),
        (asked("what?", video={"bytes": None, "path": "a.mp4"}), "<image>\nwhat?", (A,)),
        (asked("what?", video=["1.jpg", "2.jpg"]), "<image>\nwhat?", (Video(("1.jpg", "2.jpg")),)),
        (asked([PART | {"video": ["1.jpg"]}, TEXT]), "<image>\nwhat?", (Video(("1.jpg",)),)),  # Qwen
        (
            asked("what?", videos=[["1.jpg"], ["2.jpg"]]),
            "<image>\n<image>\nwhat?",
            (Video(("1.jpg",)), Video(("2.jpg",))),
        ),
        ({"file_name": "a.mp4", "question": "what?", "answer": "noise"}, "<image>\nwhat?", (A,)),
    ],
)
def test_layouts(record: dict[str, Any], question: str, refs: tuple[Any, ...]) -> None:
    sample = from_record(record, READS)
    assert (sample.conversations[0][1], sample.image_refs) == (question, refs)


def test_captions() -> None:
    assert from_record({"video": "a.mp4", "caption": "a dog"}, READS) == RawSample(caption="a dog", image_refs=(A,))
    assert from_record({"video_path": "a.mp4", "text": "a dog"}, READS).caption == "a dog"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (asked("<video> <video>", video="a.mp4"), "video_count_mismatch"),
        (asked("<image> <image>", video="a.mp4"), "image_count_mismatch"),
        (asked("<video>\nwhat?"), "unexpected_video"),
        (asked("what?", video=["1.jpg", "a.mp4"]), "unexpected_video"),
        (asked("what?", video="1.jpg"), "unexpected_video"),
        (asked("what?", video={"fps": 3}), "bad_video_field"),
        (asked("what?", thing="a.mp4"), "unexpected_video"),
        (asked("what?", image="a.mp4"), "unexpected_video"),
        ({"text": "words", "meta": {"clip": "a.webm"}}, "unexpected_video"),
    ],
)
def test_what_fits_nowhere_has_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample) as error:
        from_record(record, READS)
    assert error.value.reason == reason and error.value.detail


def test_formats_that_read_no_videos_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSample, match="unexpected_video"):
        from_record(asked("what?", video="a.mp4"), Reading(videos=None))
    monkeypatch.setattr(extra_formats, "_package", lambda kind: None)
    for reading in (READS, Reading(videos=None)):
        with pytest.raises(BadSample, match=r"unread_video \(.*a\.mp4; VIDEO needs av: pip install -e '\.\[video\]'"):
            from_record(asked("what?", video="a.mp4"), reading)


@pytest.mark.parametrize(
    ("text", "frames", "lines"),
    [
        ("<image>\nwhat?", (1, 2), "Frame1: <image>\nFrame2: <image>\nwhat?"),  # as InternVL's models are asked
        ("<image>what?", (1, 2), "Frame1: <image>\nFrame2: <image>\nwhat?"),
        ("<image> and <image>", (0, 1, 2), "<image> and Frame1: <image>\nFrame2: <image>\n"),
        ("<image>\n<image>\nso", (1, 1), "Frame1: <image>\nFrame1: <image>\nso"),
        ("<image>\nso", (0,), "<image>\nso"),
    ],
)
def test_lines_of_frames(text: str, frames: tuple[int, ...], lines: str) -> None:
    sample = with_frames(RawSample(conversations=(("human", text), ("gpt", "noise"))), frames)
    assert sample.conversations == (("human", lines), ("gpt", "noise"))
    assert sample.frames == (frames if any(frames) else ())
    stored = without_frames(sample)  # as build keeps it: one mark for each
    assert stored.conversations[0][1].count("<image>") == sum(number < 2 for number in frames)
    assert with_frames(dataclasses.replace(stored, frames=()), frames) == sample


def test_videos_that_come_with_a_record() -> None:
    sample = from_record(asked("<image> and <video>?"), Reading(images=1, videos=1))
    assert sample.conversations[0][1] == "<image> and <image>?"
    with pytest.raises(BadSample, match="image_count_mismatch"):
        from_record(asked("<video> and <image>?"), Reading(images=1, videos=1))
