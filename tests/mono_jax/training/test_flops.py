"""Tokens, FLOPs and peaks of devices."""

from __future__ import annotations

import jax
import pytest

from data_pipelines.batch import ragged
from mono_jax import tree
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.training import stages
from mono_jax.training.callbacks.recorder import Speed
from mono_jax.training.flops import count_tokens, peak_flops, step_flops
from mono_jax.training.groups import trained_groups
from mono_jax.training.metrics import console_line
from tests.mono_jax.helpers import SPEC, random_batch


def test_counts_of_a_batch():
    counts = count_tokens(random_batch(3))
    assert counts["visual"] == 3 * SPEC.visual_tokens
    assert counts["text"] == 3 * (SPEC.text_tokens - 2)
    first, second = SPEC.visual_tokens + SPEC.text_tokens // 2, SPEC.text_tokens // 2 - 2
    assert counts["pairs"] == 3 * (first * (first + 1) + second * (second + 1)) // 2


def test_counts_do_not_depend_on_where_the_boundary_is():
    batch = random_batch(3)
    assert count_tokens(ragged(batch, 32, 8)) == count_tokens(batch)


def test_flops_of_the_2b_model_are_those_of_its_parameters():
    """Training everything costs 6 FLOPs per matmul parameter and token processed by it (plus the scores)."""
    config = preset("mono_internvl_2b")
    everything = trained_groups(stages.get_stage("S2"), config)
    text = step_flops(config, everything, {"visual": 0, "text": 1, "pairs": 0})
    shapes = Model(preset("internlm2_1_8b", vocab_size=config.vocab_size)).abstract_params()
    matmul = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1) - config.vocab_size * 2048
    matmul -= shapes["layers"]["attention_norm"]["scale"].size * 2
    assert text == pytest.approx(6 * matmul, rel=1e-6)
    # One FFN costs 6 * 2048 * 8192 = 100.7 MFLOP per token forward; a visual token also uses one FFN.
    both = step_flops(config, frozenset(), {"visual": 1, "text": 0, "pairs": 0})
    assert both == pytest.approx(2 * 24 * (100.7e6 + 25.2e6), rel=0.02)


def test_a_frozen_weight_saves_a_third():
    config = preset("tiny_mono")
    counts = {"visual": 0, "text": 10, "pairs": 0}
    everything = trained_groups(stages.get_stage("S2"), config)
    nothing = step_flops(config, frozenset(), counts)
    assert nothing == pytest.approx(step_flops(config, everything, counts) * 2 / 3)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H800 PCIe", 756.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind: str, tera: float):
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA RTX A1000", "NVIDIA A10G", "NVIDIA L40", "TPU v40", ""])
def test_a_device_without_a_data_sheet_has_no_peak(kind: str):
    assert peak_flops(kind) is None


def test_without_a_peak_no_mfu_is_reported():
    counts = {"visual": 1.0}
    assert Speed(lambda _: 8.0, None).mfu(counts, 2.0) is None
    assert Speed(lambda _: 8.0, 16.0).mfu(counts, 2.0) == 0.25
    record = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_s": 1.0, "data_wait": 0.0, "eta_s": 1.0}
    assert "MFU" not in console_line("S2", 9, record | {"mfu": None})
    assert "MFU 25.0%" in console_line("S2", 9, record | {"mfu": 0.25})


@pytest.mark.parametrize("name", ["tiny_lm", "tiny_mono", "tiny_mono_1_5", "tiny_modular"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_flops_are_those_of_every_matmul(name: str, trained: bool):
    """From the shapes of the kernels: which tokens each processes, and which of its gradients are needed."""
    config = preset(name)
    vision = config.vision
    counts = {"visual": 7 if vision else 0, "text": 5, "pairs": 11}
    text_only = ["lm_head", *["layers/feed_forward"] * config.visual_ffn_experts]
    text_only += ["layers/attention/wqkv"] * config.visual_attention_experts
    expected = 3 * 4 * config.hidden_size * config.num_hidden_layers * counts["pairs"]
    for path, leaf in tree.flatten(Model(config).abstract_params()).items():
        if not path.endswith("kernel"):
            continue
        tokens = counts["visual"] + counts["text"]
        if path.startswith("vision/"):  # once for each patch of 2 x 2 in a token
            tokens = counts["visual"] * vision.shuffle**2
        elif path.startswith(("layers/visual", "projector")):
            tokens = counts["visual"]
        elif path.startswith(tuple(text_only)):
            tokens = counts["text"]
        passes = 1 + (path != "vision/patch_embedding/kernel") + trained
        expected += 2 * leaf.size * tokens * passes
    if vision is not None and vision.kind == "intern_vit":  # every patch of a tile sees all of them
        seen = counts["visual"] * vision.shuffle**2 * vision.tile_tokens * vision.shuffle**2
        expected += 3 * 4 * vision.hidden_size * seen * vision.num_hidden_layers
    everything = trained_groups(stages.get_stage("full"), config) if trained else frozenset()
    assert step_flops(config, everything, counts) == pytest.approx(expected, rel=1e-9)
