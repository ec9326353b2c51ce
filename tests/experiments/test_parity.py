"""mono-jax reproduces the public release, and the plain PyTorch form on models unlike the golden ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mono_jax.errors import MonoJaxError
from mono_jax.evaluation import parity
from mono_jax.training.optim_config import OptimConfig

GOLDEN = [
    "mono_tiny/forward",
    "mono_tiny/text_only",
    "mono_tiny/position_interpolation",
    "mono_tiny_ntk/forward",
    "modular_tiny/forward",
    "mono_tiny/generate",
    "mono_tiny/train_S1.1",
    "mono_tiny/train_S1.2",
    "mono_tiny/train_S1.3",
    "mono_tiny/train_S2",
]

NTK = {"type": "dynamic", "factor": 3.0}
LINEAR = {"type": "linear", "factor": 2.5}
OTHER: dict[str, dict[str, Any]] = {
    # Each has rows with several tiles, images at any position, padding, and a text-only row where possible.
    "mono_heads_bias_linear": {
        "rows": ("tIttIItt", "ttt", "IttttttIt"),
        "heads": 4,
        "kv_heads": 4,
        "bias": True,
        "rope_scaling": LINEAR,
        "vocab": 151,
    },
    "mono_text_only": {"rows": ("tttttt", "tt", "ttttttttt"), "heads": 2, "kv_heads": 1, "rope_theta": 1e4},
    "mono15_one_kv_head_ntk": {
        "kind": "mono15",
        "rows": ("ttIItt", "tIttttttt"),
        "hidden": 64,
        "heads": 8,
        "kv_heads": 1,
        "bias": True,
        "rope_scaling": NTK,
        "max_position": 10,
        "rms_norm_eps": 1e-6,
    },
    "mono_larger_tiles": {"rows": ("tIt", "ttItt"), "tile": 84, "image_size": 56, "patch": 14, "layers": 1},
    "mono_smaller_tiles": {"rows": ("tIIt", "ttItt"), "tile": 32, "image_size": 64, "patch": 8, "layers": 1},
    "modular_rms_qk": {
        "kind": "modular",
        "rows": ("tIttI", "ttt", "ttItt"),
        "vit_norm": "rms_norm",
        "qk_norm": True,
        "qkv_bias": False,
        "vit_layers": 3,
        "select_layer": -2,
        "bias": True,
    },
    "modular_v1_layer_norm_qk": {
        "kind": "modular",
        "rows": ("tIIt", "ttItt"),
        "ps_version": "v1",
        "qk_norm": True,
        "vit_heads": 2,
        "tile": 84,
        "image_size": 56,
    },
    "dense_bias": {
        "kind": "dense",
        "rows": ("tttttttttt", "ttt"),
        "heads": 6,
        "kv_heads": 3,
        "bias": True,
        "vocab": 97,
    },
    "generate_mono_ntk": {
        "what": "generate",
        "rows": ("ttIttt", "Ittttt"),
        "rope_scaling": NTK,
        "max_position": 12,
        "steps": 8,
        "seed": 3,
    },
    "generate_modular": {
        "what": "generate",
        "kind": "modular",
        "rows": ("tIIt",),
        "qk_norm": True,
        "bias": True,
        "steps": 4,
    },
    "generate_dense": {
        "what": "generate",
        "kind": "dense",
        "rows": ("tttt", "tttt", "tttt"),
        "heads": 4,
        "kv_heads": 4,
        "steps": 6,
    },
    "train_mono15_S1.3++": {
        "what": "train",
        "kind": "mono15",
        "stage": "S1.3++",
        "rows": ("tItt", "ttttt"),
        "bias": True,
        "steps": 4,
        "optimizer": {"learning_rate": 2e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "clip": 0.5},
    },
    "train_mono_S1.1": {
        "what": "train",
        "stage": "S1.1",
        "rows": ("tIIttt", "tttIt"),
        "heads": 3,
        "kv_heads": 3,
        "bias": True,
        "steps": 3,
        "optimizer": {"learning_rate": 5e-4, "weight_decay": 0.0, "clip": 100.0},
    },
    "train_modular_S2": {
        "what": "train",
        "kind": "modular",
        "rows": ("tIt", "tttt"),
        "qk_norm": True,
        "vit_norm": "rms_norm",
        "steps": 3,
        "optimizer": {"learning_rate": 3e-4, "betas": (0.9, 0.98)},
    },
}


def check(result: dict[str, Any], learning_rate: float = 1e-3) -> None:
    """The project's tolerances, in float32 on the CPU."""
    if result["kind"] == "forward":
        assert result["logits_max_abs"] <= 2e-4
        assert result["hidden_max_abs"] <= 2e-4
        assert result["loss_abs"] <= 1e-4
        assert result["attention_max_abs"] is None or result["attention_max_abs"] <= 2e-4
        assert result["grad_max_rel"] is None or result["grad_max_rel"] <= 1e-3
    elif result["kind"] == "generate":
        assert result["tokens_equal"]
        assert result["step_logits_max_abs"] <= 2e-4
    else:
        assert result["losses_max_abs"] <= 1e-4
        assert result["grad_norms_max_rel"] <= 1e-3
        assert result["frozen_changed"] == 0
        # A step changes an element by about the learning rate, whatever the size of its gradient.
        assert result["params_max_abs"] <= 0.1 * learning_rate


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(golden_dir: Path, case: str) -> None:
    result = parity.run_case(golden_dir / case.split("/")[0], golden_dir / f"{case}.safetensors")
    assert result["kind"] == {"train": "train", "gener": "generate"}.get(case.split("/")[1][:5], "forward")
    check(result)


# Each shares what it tests with a golden case or another model here.
REPEATED = {"mono_smaller_tiles", "modular_v1_layer_norm_qk", "generate_dense", "train_mono_S1.1", "train_modular_S2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in REPEATED else name for name in OTHER]
)
def test_other_models(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    from tests.reference.make_cases import make_case

    case = make_case(tmp_path, **OTHER[name])
    settings = parity.golden_optim()
    if optimizer := dict(OTHER[name].get("optimizer", {})):
        b1, b2 = optimizer.pop("betas", (0.9, 0.999))
        clip = optimizer.pop("clip", 1.0)
        settings = OptimConfig(
            schedule="constant", warmup=0.0, b1=b1, b2=b2, clip_norm=clip, **({"weight_decay": 0.01} | optimizer)
        )
    result = parity.run_case(tmp_path, case, settings=settings)
    assert result["kind"] == OTHER[name].get("what", "forward")
    check(result, settings.learning_rate)


def test_text_qkv_as_visual_qkv_is_the_model_without(golden_dir: Path, tmp_path: Path) -> None:
    """A 1.5 model whose visual QKV equals its text QKV reproduces the cases of Mono-InternVL."""
    config = json.loads((golden_dir / "mono_tiny" / "config.json").read_text())
    config["llm_config"]["architectures"] = ["InternLM2VEAttentionForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(golden_dir / "mono_tiny" / "model.safetensors")
    twins = {name.replace("wqkv", "wqkv_ve"): tensor for name, tensor in tensors.items() if "wqkv" in name}
    save_file(tensors | twins, tmp_path / "model.safetensors")
    # The gradient of the case's single QKV is the sum over the two QKVs here, so it is not compared.
    case = load_file(golden_dir / "mono_tiny" / "forward.safetensors")
    save_file({k: v for k, v in case.items() if not k.startswith("grad.")}, tmp_path / "forward.safetensors")
    for name in (tmp_path / "forward.safetensors", golden_dir / "mono_tiny" / "generate.safetensors"):
        check(parity.run_case(tmp_path, name))
    # S1.1 trains no attention, so the two QKVs change nothing, not even gradients.
    check(parity.run_case(tmp_path, golden_dir / "mono_tiny" / "train_S1.1.safetensors"))


def test_command_line(golden_dir: Path) -> None:
    """The last line of the command is one JSON object with the keys that external checks read."""
    command = [sys.executable, "experiments/parity.py", f"--model_dir={golden_dir / 'mono_tiny'}"]
    case = golden_dir / "mono_tiny" / "train_S1.1.safetensors"
    run = subprocess.run(
        [*command, f"--case={case}", "--stage=S1.1", "--json"],
        cwd=Path(parity.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout.splitlines()[-1])
    keys = ["kind", "stage", "losses_max_abs", "grad_norms_max_rel", "params_max_abs", "frozen_changed"]
    assert list(result) == keys
    assert result["kind"] == "train" and result["stage"] == "S1.1"
    check(result)


def test_a_wrong_number_shows(golden_dir: Path, tmp_path: Path) -> None:
    """Differences are measured everywhere that matters: a single changed number is detected."""
    case = load_file(golden_dir / "mono_tiny" / "forward.safetensors")
    case["logits"][1, 12, 7] += 0.5
    case["hidden_states.2"][0, 8, 3] += 0.25
    case["attentions.1"][1, 4, 9, 2] += 0.125
    name = "grad.language_model.model.layers.1.feed_forward_ve.w2.weight"
    case[name] *= 1.5
    save_file(case, tmp_path / "forward.safetensors")
    result = parity.run_case(golden_dir / "mono_tiny", tmp_path / "forward.safetensors")
    assert result["logits_max_abs"] == pytest.approx(0.5, abs=1e-3)
    assert result["hidden_max_abs"] == pytest.approx(0.25, abs=1e-3)
    assert result["attention_max_abs"] == pytest.approx(0.125, abs=1e-3)
    assert result["grad_max_rel"] == pytest.approx(1 / 3, abs=1e-3)


def test_bad_cases_are_one_line_errors(golden_dir: Path, tmp_path: Path) -> None:
    golden = load_file(golden_dir / "mono_tiny" / "forward.safetensors")
    visual_label = golden["labels"].copy()
    visual_label[0, 5] = 7
    wide = np.ascontiguousarray(golden["pixel_values"][..., :28])
    for change, message in (
        ({"pixel_values": None}, "pixel_values"),
        ({"pixel_values": golden["pixel_values"][:2]}, "16 image placeholders but 8 patches"),
        ({"pixel_values": wide}, "only square tiles"),
        ({"labels": visual_label}, "a visual position has a label"),
        ({"logits": None}, "no case"),
    ):
        case = {key: value for key, value in (golden | change).items() if value is not None}
        save_file(case, tmp_path / "forward.safetensors")
        with pytest.raises(MonoJaxError, match=message):
            parity.run_case(golden_dir / "mono_tiny", tmp_path / "forward.safetensors")
    (tmp_path / "forward.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MonoJaxError, match="not a readable"):
        parity.run_case(golden_dir / "mono_tiny", tmp_path / "forward.safetensors")
