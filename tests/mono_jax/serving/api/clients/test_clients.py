"""Unmodified third-party clients against experiments/serve.py with a real model.

The Python of tests/clients.py has openai, lm_eval[api], lmms-eval, or VLMEvalKit's vlmeval.
"""

from __future__ import annotations

import base64
import functools
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

from mono_jax.evaluation.language.likelihood import Likelihoods
from mono_jax.generation.chat import open_model
from tests.clients import PYTHON, environment
from tests.mono_jax.serving.api.real_server import TOKENS, RealServer, expected, messages, questions, serving_folder
from tests.tiny_folder import tiny_folder

HERE = Path(__file__).parent
ASKED = questions(24)


def started(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """The clients' Python, without this project."""
    return subprocess.run(
        [PYTHON, *arguments], input=text, env=environment(), cwd=HERE, capture_output=True, text=True, timeout=600
    )


@functools.cache
def missing(module: str) -> str:
    """Why a module cannot be imported; "" if it can."""
    done = started("-c", f"import {module}")
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def needs(module: str) -> None:
    if why := missing(module):
        pytest.skip(f"{PYTHON}: {why}")


def run(client: str, job: dict[str, Any]) -> dict[str, Any]:
    """What the client found."""
    done = started(f"asked_by_{client}.py", text=json.dumps(job))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def server(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with serving_folder(tiny_folder(golden_dir, tmp_path_factory.mktemp("tiny"))) as server:
        yield server


@pytest.fixture(scope="module")
def answers(server: RealServer) -> list[str]:
    """Generator's answers."""
    return expected(server.folder, ASKED)


def plain(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In JSON form."""
    return [one | {"pictures": [base64.b64encode(data).decode() for data in one["pictures"]]} for one in asked]


@pytest.mark.parametrize("at_a_time", [32, 128])
def test_openai(at_a_time: int, request: pytest.FixtureRequest):
    needs("openai")
    server, answers = request.getfixturevalue("server"), request.getfixturevalue("answers")
    sent = [messages(one) for one in ASKED]
    found = run("openai", {"url": server.url, "messages": sent, "tokens": TOKENS, "at_a_time": at_a_time})
    assert found["whole"] == found["streamed"] == answers and found["again"]
    assert found["helped"] == answers[0]
    assert found["cut"] == [2] * len(ASKED)
    assert found["faults"] == [
        ["NotFoundError", "model"],
        ["BadRequestError", "messages"],
        ["BadRequestError", "temperature"],
    ]
    assert found["echo"] == [7, None]
    end = time.monotonic() + 60
    while "mono_jax_running_requests 0.0" not in server.get("/metrics")[1]:  # the cut-off streams are abandoned
        assert time.monotonic() < end
        time.sleep(0.05)


def test_lm_eval(request: pytest.FixtureRequest):
    """Log-likelihoods equal our own, and no tokenizer besides the server's is needed."""
    needs("lm_eval.models.openai_completions, tenacity")
    server, answers = request.getfixturevalue("server"), request.getfixturevalue("answers")
    pairs = [
        ["once upon", " a time"],
        ["the cat", " sat"],
        ["the cat", " sat on the mat"],
        ["a b", " c"],
        ["x", " y z"],
    ]
    of_text = [number for number, one in enumerate(ASKED) if not one["pictures"]]
    job = {"url": server.url, "model": server.folder.name, "pairs": pairs, "tokens": TOKENS}
    found = run("lm_eval", job | {"questions": [ASKED[number]["text"] for number in of_text]})
    assert found["backend"] == "remote"
    assert found["answers"] == [answers[number] for number in of_text]
    opened = open_model(str(server.folder), None)
    encode = opened.tokenizer.encode
    both = [(encode(context), encode(context + rest)[len(encode(context)) :]) for context, rest in pairs]
    likelihoods = Likelihoods(opened.generator, 512)
    own = likelihoods(both)
    np.testing.assert_allclose([value for value, _ in found["likelihoods"]], [value for value, _ in own], rtol=1e-4)
    assert [greedy for _, greedy in found["likelihoods"]] == [greedy for _, greedy in own]
    whole = [opened.tokenizer.bos], encode("".join(pairs[0]))
    np.testing.assert_allclose(
        found["rolling"], [value for value, _ in Likelihoods(opened.generator, 512)([whole])], rtol=1e-4
    )


def test_lmms_eval(request: pytest.FixtureRequest):
    needs("lmms_eval.models.chat.openai")
    server, answers = request.getfixturevalue("server"), request.getfixturevalue("answers")
    job = {"url": server.url, "model": server.folder.name, "asked": plain(ASKED), "tokens": TOKENS}
    assert run("lmms_eval", job)["answers"] == answers


def test_vlmevalkit(request: pytest.FixtureRequest):
    """It converts its images to JPEG before sending."""
    needs("vlmeval.api.gpt")
    server = request.getfixturevalue("server")
    job = {"url": server.url, "model": server.folder.name, "asked": plain(ASKED[:9]), "tokens": TOKENS}
    found = run("vlmevalkit", job)
    sent = [
        one | {"pictures": [base64.b64decode(each) for each in of_one]} for one, of_one in zip(ASKED, found["sent"])
    ]
    assert any(one["pictures"][0][:3] == b"\xff\xd8\xff" for one in sent if one["pictures"])
    assert found["answers"] == found["streamed"] == expected(server.folder, sent)
