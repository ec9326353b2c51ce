"""The data benchmark finishes and reports the values that the README and the build notes quote."""

from __future__ import annotations

import json

import pytest

from experiments.benchmarks import data, data_planning


@pytest.mark.slow
def test_rehearsal(golden_dir, capsys):
    small = [
        "--images=2",
        "--rounds=1",
        "--records=3",
        "--tiles",
        "1",
        "--size",
        "300",
        "200",
        "--plan_blocks=1",
        "--lengths=64",
    ]
    data.main([f"--tokenizer={golden_dir / 'chat'}", "--json", *small])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["paths"]["1"]) >= {"baseline", "baseline_normalised", "exact"}
    assert set(result["reading"]) == {"make_index", "read_sample", "read_text"}
    assert set(result["loaders"]) >= {"ours, exact", "tarfile, Pillow", "webdataset, Pillow"}
    rates = [
        *result["loaders"].values(),
        *result["paths"]["1"].values(),
        *result["reading"].values(),
        *result["steps_alone"].values(),
    ]
    assert min(rates) > 0
    planning = result["planning"]
    assert planning["least_rows"] <= planning["rows"] and 0.9 < planning["visual_occupancy"] <= 1
    assert result["cores"]["cores_exact"] == pytest.approx(
        result["cores"]["images_per_s"] / result["paths"]["1"]["exact"]
    )


def test_extrapolation_by_hand(capsys):
    """One chip's 1e12 FLOP/s: 2 * 1.9e9 * (2 * 718 + 0.67 * 640) FLOPs per sample."""
    per_sample = 2 * 1.9e9 * (2 * 718 + 0.67 * 640)
    cores = data_planning.extrapolate({4: {"exact": 10.0}}, chip_tflops=1.0, mfu=1.0)
    assert cores["images_per_s"] == pytest.approx(256 * 1e12 / per_sample)
    assert cores["cores_exact"] == pytest.approx(cores["images_per_s"] / 10)
    assert "256 chips" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--images=0", "--rounds=0", "--records=0"])
def test_nothing_to_measure(golden_dir, wrong, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--tokenizer={golden_dir / 'chat'}", wrong])
    assert "at least 1" in capsys.readouterr().err
