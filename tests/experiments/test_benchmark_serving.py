"""The serving benchmark: all points are measured and written, and answers equal Generator's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.encoding.tokenizer import Tokenizer
from experiments.benchmarks import serving
from experiments.benchmarks.first_token_bench.models import MODELS
from experiments.benchmarks.serving_bench import clients, over_http, planning, run
from mono_jax.errors import ConfigError
from mono_jax.serving.contract import Event, Stats
from tests.tiny_folder import tiny_config


@pytest.mark.slow
def test_every_point_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tiles", "2", "--text=16", "--new_tokens=9", "--rounds=2", "--concurrency", "1", "3", "--requests=3")
    serving.main(["--preset=tiny", *sizes, f"--out={tmp_path}", "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / run.FILE).read_text())
    assert printed == report
    kinds = [point["kind"] for point in report["points"]]
    assert kinds == ["first_token", "split", "concurrency_1", "concurrency_3", "one_by_one", "finished"]
    points = dict(zip(kinds, report["points"]))
    assert not any("failed" in point for point in points.values())
    assert all(point["input_tokens"] == 3 * 16 + 16 for point in points.values())  # two tiles and a thumbnail
    for name in MODELS:
        assert points["one_by_one"][name]["equal_answers"] == 3
        assert all(seconds >= 0 for seconds in points["split"][name].values())
        assert points["concurrency_3"][name]["tokens_per_s"] > 0
        assert points["concurrency_3"][name]["compilations"] == 0
        for count in (1, 3):
            assert points[f"concurrency_{count}"][name]["equal_bare_answers"] == count
            found = points[f"concurrency_{count}"][name]
            above = [turn["above_bare_s"] for turn in found["turns"]]
            assert len(above) == 2 and found["above_bare_s"] == pytest.approx(statistics.mean(above))
            assert found["bare_step_s"] > 0
    assert len(points["finished"]["step_s"]) == 2


@pytest.fixture
def v5e() -> str:
    from mono_jax.runs.planning.targets import target

    try:
        return target("v5e:1x1").name
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_plan_has_the_work_of_both_models(v5e: str, tmp_path: Path) -> None:
    """Compares FLOPs of the compiled programs with counts from shapes; padding and blocks add to them."""
    sizes = ("--tiles", "1", "4", "--text=40", "--new_tokens=8", "--prefill_chunk=128", f"--out={tmp_path}")
    serving.main(["--preset=tiny", "--plan", v5e, *sizes])
    report = json.loads((tmp_path / planning.FILE).read_text())
    assert [(p["tiles"], p["input_tokens"]) for p in report["points"]] == [(1, 56), (4, 120)]
    for point in report["points"]:
        for way in planning.WAYS:
            for name in MODELS:
                found = point[way][name]
                assert found["silent_kernels"] == found["unknown_loops"] == []
                # Chunks of 128 slots, and blocks of 128 keys, are several times longer than this prompt.
                assert 1.0 <= found["flops"] / point["flops"][name] < (2.0 if way == "whole" else 16.0)
                assert 0 < found["compute_s"] <= found["seconds"]
            times = [point[way][name]["seconds"] for name in MODELS]
            assert point[way]["reduction"] == pytest.approx(1 - times[0] / times[1])
        assert point["served"][MODELS[0]]["calls"].keys() == {"embed", "read"}


def test_a_plan_is_for_one_chip_that_is_known() -> None:
    for name, message in (("cpu:1", "one chip with a data sheet"), ("v7:1x1", "use for example")):
        with pytest.raises(ConfigError, match=message):
            serving.main(["--plan", name])


def test_a_running_server_is_measured_from_outside(
    golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")
    from tests.mono_jax.serving.api.running_server import serving as serving_api
    from tests.mono_jax.serving.api.scripted import ScriptedEngine

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tokenizer = Tokenizer(golden_dir / "chat")
    engine = ScriptedEngine(tokenizer, tiny_config(tokenizer))
    engine.start()
    sizes = ("--tiles", "1", "--tile_size=56", "--text=5", "--new_tokens=3", "--rounds=4", "--concurrency", "1", "2")
    with serving_api(engine, keys=["secret"]) as client:
        serving.main([f"--url={client.url}/v1", *sizes, f"--out={tmp_path}", "--json"])
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report == json.loads((tmp_path / over_http.FILE).read_text())
        assert report["model"] == engine.name
        assert [(p["tiles"], p["concurrency"], p["requests"]) for p in report["points"]] == [(1, 1, 4), (1, 2, 4)]
        for answer in (answer for point in report["points"] for answer in point["answers"]):
            assert 0 < answer["first_s"] <= answer["seconds"]
            assert answer["tokens"] == 3 and answer["prompt_tokens"] > 5
        monkeypatch.setenv("OPENAI_API_KEY", "another")
        with pytest.raises(ConfigError, match="401"):
            serving.main([f"--url={client.url}/v1", *sizes])
    engine.close()
    for url, message in (("127.0.0.1:8000", "give it as http"), (f"{client.url}/v1", "no server answers")):
        with pytest.raises(ConfigError, match=message):
            serving.main([f"--url={url}"])


class FailingEngine:
    """Answers in a thread that drops what a client raises; every ``nth`` answer ends by ``finish``."""

    def __init__(self, finish: str, nth: int):
        self._finish, self._nth, self._submitted = finish, nth, 0

    def stats(self) -> Stats:
        return Stats()

    def submit(self, request: Any, on_event: Any) -> None:
        self._submitted += 1
        finish = "length" if self._submitted % self._nth else self._finish

        def answer() -> None:
            with contextlib.suppress(Exception):
                on_event(Event(tokens=(1,), finish=finish, message="the device is gone"))

        threading.Thread(target=answer).start()


@pytest.mark.parametrize("finish", ["error", "cancelled", "stop"])
@pytest.mark.parametrize(("nth", "concurrency"), [(1, 1), (1, 4), (3, 1), (3, 2), (6, 4)])
def test_a_failed_answer_ends_the_measurement(finish: str, nth: int, concurrency: int) -> None:
    """With its reason: waiting for it would never end."""
    raised: list[BaseException] = []

    def measure() -> None:
        try:
            clients.serve(FailingEngine(finish, nth), [None] * 6, concurrency)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert f"ended by '{finish}': the device is gone" in str(raised[0])


def test_steps_that_could_not_be_timed_are_not_reported_as_fast() -> None:
    stats = Stats(working_s=2.0, host_share=0.5, steps=3, step_s=(7.0,), step_host_s=(7.0,), steps_timed=1)
    later = dataclasses.replace(stats, working_s=4.0, steps=9)
    found = {"first_token_s": 1.0, "tokens_per_s": 2.0, "bare_step_s": 3e-3} | run._overhead(stats, later)
    line = run._line({"kind": "concurrency_16", "tiles": 14, "input_tokens": 80} | dict.fromkeys(MODELS, found))
    assert found["step_s"] is None and "step - / - ms" in line and "thread - / - %" in line


def test_the_scheduler_s_share_is_of_the_new_steps() -> None:
    """Prompts, whose reading takes long, would make it seem small."""
    stats = Stats(working_s=2.0, host_share=0.5, steps=3, step_s=(7.0,), step_host_s=(7.0,), steps_timed=1)
    times = {"step_s": (7.0, 0.4, 0.4, 0.6), "step_host_s": (7.0, 0.02, 0.1, 0.02)}
    found = run._overhead(stats, dataclasses.replace(stats, working_s=12.0, host_share=0.1, steps_timed=4, **times))
    assert found == {"host_share": pytest.approx(0.02), "step_s": 0.4, "step_host_share": pytest.approx(0.05)}


def test_what_failed_is_told() -> None:
    point = {"kind": "split", "tiles": 1, "input_tokens": 80, "failed": "RuntimeError: no memory"}
    assert run._line(point) == "split of 1 tiles, 80 tokens in: failed: RuntimeError: no memory"
