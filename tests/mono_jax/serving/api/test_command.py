"""experiments/serve.py: a real model gives Generator's answers over HTTP, to many clients at a time."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

from experiments import serve as command
from mono_jax.errors import ConfigError, GenerationError, MonoJaxError
from mono_jax.serving.api.server import bind, run
from tests.mono_jax.serving.api.real_server import ROOT, RealServer, expected, messages, questions, serving_folder
from tests.tiny_folder import tiny_folder

ASKED = questions(32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port=PORT"], "--host=127.0.0.1 --port=PORT: Address already in use: choose another port or host"),
        (["--port=0", "--host=300.0.0.1"], "--host=300.0.0.1 --port=0: "),
        (["--port=0", "--max_slots=5"], "engine.max_length is 8192"),
        (["--port=0", "--timeout_s=0"], "api.timeout_s is 0.0"),
        (["--port=0"], "nowhere: no such folder"),
    ],
)
def test_faults_are_named_before_a_model_is_read(flags: list[str], said: str):
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = str(place.getsockname()[1])
        with pytest.raises(MonoJaxError) as error:
            command.main(["--model=nowhere", *(flag.replace("PORT", port) for flag in flags)])
    assert said.replace("PORT", port) in str(error.value)


def test_connections_are_refused_until_requests_are_served(monkeypatch: pytest.MonkeyPatch):
    """During the warm-up, which takes minutes, a client or a probe must not take the server for one that hangs."""
    ports, refused = [], []

    class Warming:
        def start(self) -> None:
            refused.append(socket.socket().connect_ex(("127.0.0.1", ports[0])))
            raise GenerationError("enough")

    def bound(host: str, port: int) -> socket.socket:
        place = bind(host, port)
        ports.append(place.getsockname()[1])
        return place

    monkeypatch.setattr("mono_jax.serving.api.server.bind", bound)
    monkeypatch.setattr("mono_jax.serving.engine.Engine.open", lambda *args, **options: Warming())
    with pytest.raises(GenerationError, match="enough"):
        command.main(["--model=m", "--port=0"])
    assert refused == [errno.ECONNREFUSED]


def test_a_port_that_is_taken_during_the_warm_up_is_named():
    with bind("127.0.0.1", 0) as place, bind(*place.getsockname()) as other:
        other.listen()
        with pytest.raises(ConfigError, match="Address already in use: choose another port"):
            run(None, place)


def test_a_thread_that_hangs_does_not_keep_the_process():
    script = """
import threading
from mono_jax.serving import start
def serve(args):
    threading.Thread(target=threading.Event().wait).start()
    return {"model": args.model}, True
start.serve = serve
from experiments import serve as command
command.main(["--model=m", "--json"])
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == {"model": "m"}


def test_an_engine_that_fails_tells_its_clients_and_ends_the_command(golden_dir: Path, tmp_path: Path):
    """Those whose answer has begun and those that wait, so that a supervisor starts the server again."""
    folder = tiny_folder(golden_dir, tmp_path)
    script = f"""
import json, sys, threading, urllib.error, urllib.request
from mono_jax.serving import loop
from mono_jax.serving.api import server
BODIES = [{{"prompt": "a", "max_tokens": 30, "stream": number % 2 == 1}} for number in range(4)]
whole = loop.Loop._step
def step(self):
    if self.records.tokens_out > 3 and len(self.scheduler.tasks()) == len(BODIES):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return whole(self) if self.records.tokens_out < 5 else []
loop.Loop._step = step
def ask(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {{"Content-Type": "application/json"}})
    try:
        text = urllib.request.urlopen(request).read().decode()
    except urllib.error.HTTPError as error:
        text = str(error.code) + error.read().decode()
    sys.stdout.write(f"answer {{text.strip().splitlines()[-1]}}\\n")
started = server.run
def run(running, place):
    url = "http://127.0.0.1:%d/v1/completions" % place.getsockname()[1]
    for number, body in enumerate(BODIES):
        threading.Timer(1 + number / 10, ask, [url, body]).start()
    started(running, place)
server.run = run
from experiments import serve as command
from mono_jax import cli
sizes = ["--max_rows=1", "--max_slots=64", "--max_length=64", "--prefill_chunk=32", "--programs="]
sys.argv = ["serve.py", "--model={folder}", "--port=0", *sizes]
cli.run(command.main)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2, ended.stderr
    why = "the engine has stopped: RuntimeError: RESOURCE_EXHAUSTED"
    assert ended.stderr.splitlines()[-1].startswith(f"error: {why}")
    answers = [line.removeprefix("answer ") for line in ended.stdout.splitlines() if line.startswith("answer ")]
    error = '{"error":{"message":"the answer failed: internal server error, see its log"'  # the log has the reason
    assert sorted(answer.partition(error)[0] for answer in answers) == ["500", "500", "data: ", "data: "]
    assert ended.stderr.count(f"an answer failed: {why}") == 4


@pytest.fixture(scope="module")
def server(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with serving_folder(tiny_folder(golden_dir, tmp_path_factory.mktemp("tiny"))) as server:
        yield server


def ask(server: RealServer, number: int) -> str:
    """The answer, streamed for every other request."""
    body: dict[str, Any] = {"messages": messages(ASKED[number]), "max_tokens": 8, "temperature": 0}
    if number % 2:
        frames = server.stream("/v1/chat/completions", body)
        return "".join(choice["delta"].get("content", "") for f in frames[:-1] for choice in f["choices"])
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def test_32_at_a_time_are_answered_as_generator_answers(server: RealServer):
    with ThreadPoolExecutor(len(ASKED)) as pool:
        found = list(pool.map(lambda number: ask(server, number), range(len(ASKED))))
    assert found == expected(server.folder, ASKED)
    assert len(set(found)) > 8
    metrics = server.get("/metrics")[1]
    assert "mono_jax_running_requests 0.0" in metrics and "mono_jax_compilations_total 0.0" in metrics
    assert server.get("/v1/models")[1]["data"][0]["id"] == server.folder.name
