"""The first-token benchmark: all points are measured and written, and FLOPs agree with the compiled programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import first_token
from experiments.benchmarks.first_token_bench import measuring, models, run
from experiments.benchmarks.first_token_bench.models import MODELS, MODULAR, MONOLITHIC, PAIRS
from mono_jax import tree
from mono_jax.errors import MonoJaxError
from mono_jax.generation.decode import Generator
from mono_jax.hlo.facts import facts
from mono_jax.models.transformer import Model


@pytest.fixture(scope="module")
def both() -> dict[str, Generator]:
    """The tiny models."""
    return models.generators(PAIRS["tiny"], 0)


@pytest.fixture
def made(both: dict[str, Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands use them, too."""
    monkeypatch.setattr(run, "generators", lambda *_: both)


def rehearse(folder: Path, *options: str) -> dict:
    sizes = ("--tiles", "2", "--batch_tiles", "2", "--rows=2", "--text=16", "--new_tokens=9", "--rounds=2")
    first_token.main(["--preset=tiny", *sizes, f"--out={folder}", *options])
    return json.loads((folder / run.FILE).read_text())


@pytest.mark.usefixtures("made")
def test_every_point_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = rehearse(tmp_path)
    assert [(p["kind"], p["tiles"], p["rows"]) for p in report["points"]] == [
        ("first_token", 2, 1),
        ("vision", 2, 1),
        ("batch", 2, 2),
        ("language", 2, 1),
    ]
    assert report["left_out"] == [] and report["versions"]["jax"] == jax.__version__ and report["device"] == "cpu"
    for point in report["points"]:
        key = "s" if point["kind"] in ("vision", "language") else "first_token_s"
        for name in MODELS:
            times = point[name]["turns"][key]
            assert len(times) == 2 and min(times) > 0
            assert point[name][key] == pytest.approx(sum(times) / 2)  # the median of two
            # Programs are compiled beforehand; if a turn had to compile again, it would take as long as the first one.
            assert max(times) < point[name]["warm_up_s"]
        assert point["reduction"] == pytest.approx(1 - point[MONOLITHIC][key] / point[MODULAR][key])
    assert report["points"][2][MODULAR]["tokens_per_s"] > 0
    *_, titles, row, batch, machine = capsys.readouterr().out.splitlines()
    assert titles.split()[:2] == ["tiles", "TFLOP"] and row.split()[:3] == ["2", "+", "1"]
    assert batch.startswith("2 rows of 2 tiles: first token") and "cpu, float32" in machine


@pytest.mark.usefixtures("made")
def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    report = rehearse(tmp_path, "--budget_s=0")
    assert report["points"] == [] and len(report["left_out"]) == 4


def test_a_point_that_fails_leaves_the_others() -> None:
    def fails() -> measuring.Times:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a long story")

    good, bad = (dict.fromkeys(MODELS, call) for call in (lambda: {"s": 1.0}, fails))
    points = [measuring.Point("vision", tiles, 1, calls) for tiles, calls in ((1, good), (2, bad))]
    measuring.warm_up(points)
    assert run._findings(points[0], 3)["reduction"] == 0
    assert run._findings(points[1], 3)["failed"].endswith("RuntimeError: RESOURCE_EXHAUSTED: out of memory")


def test_both_models_share_the_language_model(both: dict[str, Generator]) -> None:
    mono, modular = (tree.flatten(both[name].params) for name in MODELS)
    for path, leaf in modular.items():
        assert path.startswith(("vision/", "projector/")) or leaf is mono[path]
    own = set(mono) - set(modular)
    assert own and all("/visual_feed_forward/" in path for path in own)


def test_the_models_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    first_token.main(["--preset=2b", "--dry_run", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    eyes = Model(PAIRS["2b"].modular).abstract_params()["vision"]
    assert sum(leaf.size for leaf in jax.tree.leaves(eyes)) == pytest.approx(304e6, rel=0.01)  # InternViT-300M
    assert sorted(map(int, report["flops"])) == [1, 4, 6, 12] and report["points"] == []
    for tiles, of_models in report["flops"].items():
        mono, modular = of_models[MONOLITHIC], of_models[MODULAR]
        assert mono["language"] == modular["language"]
        tokens = 256 * (int(tiles) + (int(tiles) > 1)) + 64
        # InternLM2-1.8B has 1.51 G weights without embeddings; the rest are scores and one row of the head.
        assert mono["language"] / (2 * 1.51e9 * tokens) == pytest.approx(1.0, abs=0.15)
        assert modular["vision"] / mono["vision"] > 40


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_compiled_programs(
    name: str, both: dict[str, Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []

    def compiled(function: Callable, *arguments: object) -> Callable:
        texts.append(jax.jit(function).lower(*arguments).compile().as_text())
        return dict

    monkeypatch.setattr(measuring, "on_device", compiled)
    generator, tiles, text = both[name], 4, 16  # neither is rounded up
    for kind in ("vision", "language"):
        measuring.parts({name: generator}, kind, tiles, argparse.Namespace(text=text, seed=0))
    config = generator.config
    expected = models.first_token_flops(config, tiles, text)
    vision, language = (facts(text).flops for text in texts)
    assert vision == expected["vision"]
    # On the CPU, scores of later keys are also computed, then masked.
    tokens = models.tiles_in_all(tiles) * config.vision.tile_tokens + text
    unseen = 4 * config.hidden_size * config.num_hidden_layers * (tokens * (tokens - 1) // 2)
    assert language == expected["language"] + unseen


def test_a_prompt_has_an_image_in_front() -> None:
    prompt = models.make_prompt(PAIRS["tiny"].monolithic, 2, 10, 0)
    assert np.flatnonzero(prompt.input_ids == 100).tolist() == list(range(2, 2 + 3 * 16))
    assert len(prompt.input_ids) == 3 * 16 + 10 and prompt.patches.shape == (3 * 16, 8, 8, 3)
    assert prompt.patches.dtype == jnp.uint8


@pytest.mark.parametrize(("option", "message"), [("--preset=3b", "2b"), ("--text=3", "at least 4")])
def test_bad_options(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MonoJaxError, match=message):
        rehearse(tmp_path, option)
