"""A judge at a URL: what it is sent, what is retried, and how its bad answers end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mono_jax.evaluation import judges
from mono_jax.evaluation.benchmarks.predictions import Replies, append_lines
from mono_jax.evaluation.judges import EndpointJudge, JudgeError
from mono_jax.evaluation.metrics.judged import Memory

Reply = tuple[int, str]


def says(text: Any) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


class Server:
    """Answers with ``replies``, repeating the last one; records the requests."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, str | None, Any]] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.asked.append((self.path, self.headers["Authorization"], body))
                code, text = served.replies[min(len(served.asked), len(served.replies)) - 1]
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Retries do not wait, and a proxy of the machine is not used."""
    monkeypatch.setattr(judges.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    started = Server()
    yield started
    started.stop()


def test_the_prompt_and_the_key_are_sent(server: Server, monkeypatch: pytest.MonkeyPatch):
    server.replies = [says(" 0.5\n")]
    assert EndpointJudge(f"{server.url}/", "grader")("how good?") == "0.5"
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    EndpointJudge(server.url, "grader")("how good?")
    body = {"model": "grader", "temperature": 0, "messages": [{"role": "user", "content": "how good?"}]}
    expected = "/v1/chat/completions", None, body
    assert server.asked == [expected, ("/v1/chat/completions", "Bearer secret", body)]


@pytest.mark.parametrize("bad", [(429, ""), (503, ""), (200, "not JSON"), (200, "{}"), says(None), (200, "[]")])
def test_what_may_pass_is_asked_again(server: Server, bad: Reply):
    server.replies = [bad, bad, says("1")]
    assert EndpointJudge(server.url, "grader")("?") == "1" and len(server.asked) == 3


@pytest.mark.parametrize(
    ("bad", "asked", "message"),
    [
        ((401, ""), 1, "HTTP 401 .*: set JUDGE_API_KEY"),
        ((404, ""), 1, "HTTP 404"),
        ((500, ""), 4, "HTTP 500"),
        ((200, "{}"), 4, "KeyError: 'choices'"),
        (says(None), 4, "AttributeError"),
    ],
)
def test_what_stays_bad_ends_with_the_judge_s_name(server: Server, bad: Reply, asked: int, message: str):
    server.replies = [bad]
    with pytest.raises(JudgeError, match=rf"judge grader at http://127\.0\.0\.1.*: {message}"):
        EndpointJudge(server.url, "grader")("?")
    assert len(server.asked) == asked


def test_a_server_that_is_not_there_is_named(server: Server):
    server.stop()
    with pytest.raises(JudgeError, match=r"judge grader at .*refused"):
        EndpointJudge(server.url, "grader")("?")


class Always:
    """A judge that always gives the same grade."""

    def __init__(self, name: str, grade: str):
        self.name, self._grade, self.asked = name, grade, 0

    def __call__(self, prompt: str) -> str:
        self.asked += 1
        return self._grade


def test_each_judge_s_grades_are_its_own(tmp_path: Path):
    """In any order, also where the file has lines that do not say whose they are; each judge is asked once."""
    append_lines(tmp_path / "judged.jsonl", [{"prompt": "?", "reply": "0.9"}])
    strict, kind = Always("strict", "0.1"), Always("kind", "1.0")
    for judge, grade in ((strict, 0.1), (kind, 1.0), (strict, 0.1), (kind, 1.0)):
        memory = Memory(judge, Replies(tmp_path / "judged.jsonl", judge.name))
        assert memory.usable("?", float) == grade
        assert float(memory.reply("?")) == grade
    assert (strict.asked, kind.asked) == (1, 1)
