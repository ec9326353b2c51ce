"""The training-step benchmark measures the same model in all forms."""

from __future__ import annotations

import importlib
import importlib.util
import json

import numpy as np
import pytest

from experiments.benchmarks import train_step
from mono_jax.errors import MonoJaxError


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    """The JSON object of the command's last line."""
    train_step.main([*options, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_forms_give_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    torch = importlib.util.find_spec("torch") is not None
    if torch:
        importlib.import_module("torch").set_num_threads(1)  # a tiny model: threads would only wait for each other
    report = run(capsys, "--preset=tiny", "--stages", "S2", "--remat", "full", "--steps=1")
    forms = ["static", "dense_both", "torch"] if torch else ["static", "dense_both"]
    assert [result["form"] for result in report["results"]] == forms
    assert list(report["left_out"]) == ([] if torch else ["torch"])
    losses = [result["loss"] for result in report["results"]]
    np.testing.assert_allclose(losses, losses[0], atol=1e-5)
    first = report["results"][0]
    assert first["tokens_per_s"] == pytest.approx(2 * 48 / first["step_s"])
    assert [ratio["static_over"] for ratio in report["ratios"]] == forms[1:]
    assert report["ratios"][0]["wall"] == pytest.approx(report["results"][1]["step_s"] / first["step_s"])


def test_grouped_kernels_give_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--rows=1",
        "--visual=128",
        "--text=128",
        "--forms",
        "static",
        "grouped",
        "--stages",
        "S1.1",
        "--steps=1",
    ]
    static, grouped = run(capsys, "--preset=tiny", "--remat", "full", *options, "--forms", "static", "grouped")[
        "results"
    ]
    assert grouped["form"] == "grouped" and grouped["loss"] == pytest.approx(static["loss"], abs=1e-5)
    assert grouped["program_gib"] > 0


def test_dry_run_of_the_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "--preset=mono_internvl_2b", "--rows=1", "--dry_run")
    assert report["parameters"] == pytest.approx(3.11e9, rel=1e-3) and report["results"] == []
    # S1.1 has no weight gradients of frozen parameters, but still propagates gradients through them.
    assert 0.5 < report["step_tflops"]["S1.1"] / report["step_tflops"]["S2"] < 1


def test_the_cpu_model_is_the_one_that_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "--preset=cpu_59m", "--dry_run")
    assert report["parameters"] == pytest.approx(59e6, rel=0.02)
    assert (report["rows"], report["visual"], report["text"], report["dtype"]) == (2, 448, 64, "float32")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--preset=tini", "tiny"),
        ("--forms=statik", "static"),
        ("--visual=33", "multiple of the 16 tokens"),
        ("--rows=0", "at least 1"),
    ],
)
def test_bad_options(option: str, message: str) -> None:
    options = [option] if "preset" in option else ["--preset=tiny", *option.split("=", 1)]
    with pytest.raises(MonoJaxError, match=message):
        train_step.main([*options, "--dry_run"])
