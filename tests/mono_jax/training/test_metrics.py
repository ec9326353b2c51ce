from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from data_pipelines.batch import ragged
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.training import metrics, stages
from mono_jax.training.groups import trained_groups
from tests.mono_jax.helpers import SPEC, random_batch


def test_counts_of_a_batch():
    counts = metrics.count_tokens(random_batch(3))
    assert counts["visual"] == 3 * SPEC.visual_tokens
    assert counts["text"] == 3 * (SPEC.text_tokens - 2)
    first, second = SPEC.visual_tokens + SPEC.text_tokens // 2, SPEC.text_tokens // 2 - 2
    assert counts["pairs"] == 3 * (first * (first + 1) + second * (second + 1)) // 2


def test_counts_do_not_depend_on_where_the_boundary_is():
    batch = random_batch(3)
    assert metrics.count_tokens(ragged(batch, 32, 8)) == metrics.count_tokens(batch)


def test_flops_of_the_2b_model_are_those_of_its_parameters():
    """Training everything costs 6 FLOPs per matmul parameter and token that goes through it (and the scores)."""
    config = preset("mono_internvl_2b")
    everything = trained_groups(stages.get_stage("S2"), config)
    text = metrics.step_flops(config, everything, {"visual": 0, "text": 1, "pairs": 0})
    shapes = Model(preset("internlm2_1_8b", vocab_size=config.vocab_size)).abstract_params()
    matmul = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1) - config.vocab_size * 2048
    matmul -= shapes["layers"]["attention_norm"]["scale"].size * 2
    assert text == pytest.approx(6 * matmul, rel=1e-6)
    # One FFN costs 6 * 2048 * 8192 = 100.7 MFLOP a token forward; a visual token takes one FFN too.
    both = metrics.step_flops(config, frozenset(), {"visual": 1, "text": 0, "pairs": 0})
    assert both == pytest.approx(2 * 24 * (100.7e6 + 25.2e6), rel=0.02)


def test_a_frozen_weight_saves_a_third():
    config = preset("tiny_mono")
    counts = {"visual": 0, "text": 10, "pairs": 0}
    everything = trained_groups(stages.get_stage("S2"), config)
    nothing = metrics.step_flops(config, frozenset(), counts)
    assert nothing == pytest.approx(metrics.step_flops(config, everything, counts) * 2 / 3)


def test_peak_is_positive_where_no_data_sheet_is_known():
    assert metrics.peak_flops() > 1e8


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3s"), (185, "3m05s"), (7620, "2h07m"), (4 * 86400 + 3 * 3600, "4d03h")]
)
def test_durations(seconds: float, text: str):
    assert metrics.duration(seconds) == text


def test_records_of_lost_steps_are_dropped_on_resume(tmp_path: Path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with metrics.MetricsWriter(tmp_path, start_step=2) as writer:
        writer.write({"step": 3, "loss": float("nan")})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": None},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_console_line_has_what_users_watch():
    record = {"step": 20, "loss": 2.5, "grad_norm": 0.7, "lr": 2e-4, "tokens_per_s": 12345.6, "mfu": 0.412}
    line = metrics.console_line("S1.1", 300, record | {"data_wait": 0.01, "eta_s": 61, "skipped": 2})
    for part in (
        "S1.1",
        " 20/300",
        "loss 2.5000",
        "2.00e-04",
        "12,346 tokens/s",
        "MFU 41.2%",
        "1m01s",
        "skipped updates 2",
    ):
        assert part in line
