"""Text and files from strangers: no expression backtracks without end, no depth of nesting ends the process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.encoding.captions import clean_caption
from data_pipelines.errors import BadSample, DataError
from data_pipelines.records import extra_formats, layouts, names, pictures, turns
from data_pipelines.sources import caption_files
from data_pipelines.sources.containers import internvl_meta
from data_pipelines.sources.conversion import tables
from mono_jax.evaluation.metrics import boxes, judged
from mono_jax.evaluation.metrics.captions import ptb
from mono_jax.evaluation.metrics.metric import Answered
from mono_jax.evaluation.questions import read_questions

MANY = 400_000
WATCHDOG_S = 600  # all cases together take seconds; a single expression that backtracks takes hours
CASES = {
    "comments without a drawing": lambda: extra_formats.kind_of(b"<!-- -->" * 8000),
    "declarations without a drawing": lambda: extra_formats.kind_of(b"<?xml?> " * 8000),
    "document types without a drawing": lambda: extra_formats.kind_of(b"<!DOCTYPE a []>" * 4000),
    "open comments": lambda: extra_formats.kind_of(b"<!-- -->" + b"<!--" * 16000),
    "brackets in a document type": lambda: extra_formats.kind_of(b"<!DOCTYPE a [" + b"] " * 30000),
    "open elements of a drawing": lambda: extra_formats._SVG_LINK.search(b"<image " * MANY),
    "queries of image names": lambda: names.IMAGE_NAME.search(".png?" * (MANY // 4) + " "),
    "queries of video names": lambda: names.VIDEO_NAME.search(".mp4?" * (MANY // 4) + " "),
    "an open data URI": lambda: pictures.references("data:" + ";a" * MANY),
    "an open image tag": lambda: names.IMAGE_TAG.search("<img>" + " " * MANY),
    "an open image tag with words": lambda: names.IMAGE_TAG.search("<img>" + "a b " * 200 + " " * MANY),
    "empty lines before a mark": lambda: names.MEDIA_MARK.search("\n" * MANY + "<"),
    "spaces after a mark": lambda: names.MEDIA_MARK.search("<video>" + " " * MANY + "x"),
    "many images in a line": lambda: pictures.placed_link("x " + "![a](b) " * MANY + "y"),
    "many image tags in HTML": lambda: pictures.placed_link("x\n" + "<img src=a>\n" * (MANY // 4) + "<b>y"),
    "a long speaker": lambda: turns.speaker_of("x" + "-" * MANY + "x"),
    "a speaker of digits": lambda: turns.speaker_of("x" + "1" * MANY + "x"),
    "an open tag in a caption": lambda: clean_caption("x<a b=" + " " * MANY),
    "an open name of a tag": lambda: clean_caption("x<a" + " " * MANY),
    "an endless number of a character": lambda: clean_caption("x&#" + "9" * MANY + ";"),
    "an escaped endless number": lambda: clean_caption("x&amp;#" + "9" * MANY),
    "commas of an open box": lambda: boxes.box_of("[" + "," * MANY, 1, 1),
    "signs in a caption": lambda: ptb.tokenize("+" * MANY),
}


def run_all() -> None:
    for name, case in CASES.items():
        print(name, flush=True)
        with contextlib.suppress(BadSample):
            case()
    print("finished")


def test_time_is_linear() -> None:
    command = [sys.executable, "-c", "from tests import test_hostile_text as test; test.run_all()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        timer = threading.Timer(WATCHDOG_S, child.kill)
        timer.start()
        said = child.stdout.read().splitlines()
        timer.cancel()
    assert said[-1:] == ["finished"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda file: layouts._choices({"choices": DEEP}), {}),
        (lambda file: tables._cell(DEEP), DEEP),
        (lambda file: internvl_meta._read_meta(str(file)), None),
        (lambda file: judged._is_bare(DEEP, Answered("1", DEEP, ("1",), fields={"answer_type": "list"})), False),
    ],
)
def test_text_nested_without_end_is_not_parsed(read: Callable[[Path], object], expected: object, tmp_path: Path):
    (tmp_path / "deep.json").write_text('{"image": ' + DEEP)
    assert read(tmp_path / "deep.json") == expected


def test_files_nested_without_end_are_named(tmp_path: Path):
    (tmp_path / "deep.jsonl").write_text(DEEP)
    with pytest.raises(DataError, match=r"deep\.jsonl:1"):
        read_questions(tmp_path / "deep.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"deep\.jsonl:1"):
        list(caption_files._jsonl_rows(str(tmp_path / "deep.jsonl"), {}))
