"""The PyTorch form reproduces every number of the public release: it can then vouch for other cases."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from experiments.benchmarks.step.torch_form import TorchModel, TorchTrainer  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
FORWARD = [
    "mono_tiny/forward",
    "mono_tiny/text_only",
    "mono_tiny/position_interpolation",
    "mono_tiny_ntk/forward",
    "modular_tiny/forward",
]
INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "pixel_values", "image_flags")


def load(golden_dir: Path, case: str) -> tuple[TorchModel, dict[str, torch.Tensor]]:
    """The model of a case with trainable tensors, and the case."""
    model = TorchModel.load(golden_dir / case.split("/")[0])
    for tensor in model.tensors.values():
        tensor.requires_grad_(True)
    return model, load_file(golden_dir / f"{case}.safetensors")


@pytest.mark.parametrize("case", FORWARD)
def test_forward_and_gradients(golden_dir: Path, case: str) -> None:
    model, want = load(golden_dir, case)
    out = model.forward(**{name: want[name] for name in INPUTS}, attentions=True)
    torch.testing.assert_close(out.loss[None], want["loss"], atol=1e-5, rtol=0)
    real = want["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], want["logits"][real], atol=2e-5, rtol=0)
    for i, state in enumerate(out.hidden_states):
        torch.testing.assert_close(state[real], want[f"hidden_states.{i}"][real], atol=2e-5, rtol=0)
    for i, attention in enumerate(out.attentions):
        both = attention.transpose(1, 2)[real], want[f"attentions.{i}"].transpose(1, 2)[real]
        torch.testing.assert_close(*both, atol=1e-6, rtol=0)
    gradients = {name.removeprefix("grad."): tensor for name, tensor in want.items() if name.startswith("grad.")}
    assert set(gradients) in (set(), set(model.tensors))
    if gradients:
        out.loss.backward()
    for name, gradient in gradients.items():
        ours = model.tensors[name].grad
        ours = torch.zeros_like(gradient) if ours is None else ours
        assert (ours - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("remat", [False, True])
def test_fused_attention_and_remat_change_nothing(golden_dir: Path, remat: bool) -> None:
    model, want = load(golden_dir, "mono_tiny/forward")
    model.remat = remat
    out = model.forward(**{name: want[name] for name in INPUTS})
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach()[None], want["loss"], atol=1e-5, rtol=0)
    name = "language_model.model.layers.0.attention.wqkv.weight"
    torch.testing.assert_close(model.tensors[name].grad, want[f"grad.{name}"], atol=1e-5, rtol=1e-4)


def test_generate(golden_dir: Path) -> None:
    model, want = load(golden_dir, "mono_tiny/generate")
    steps = want["generated"].shape[1]
    tokens, logits = model.generate(want["input_ids"], want["pixel_values"], steps)
    assert torch.equal(tokens, want["generated"])
    torch.testing.assert_close(logits, want["step_logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("stage", ["S1.1", "S1.2", "S1.3", "S2"])
def test_trajectory(golden_dir: Path, stage: str) -> None:
    model, want = load(golden_dir, f"mono_tiny/train_{stage}")
    before = {name: tensor.detach().clone() for name, tensor in model.tensors.items()}
    trainer = TorchTrainer(model, stage)
    for i, (loss, norm) in enumerate(zip(want["losses"], want["grad_norms"], strict=True)):
        batch = {name: want[f"step{i}.{name}"] for name in INPUTS if f"step{i}.{name}" in want}
        ours = trainer.step(**batch)
        torch.testing.assert_close(ours[0], loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours[1], norm, atol=0, rtol=1e-4)
    for name, tensor in model.tensors.items():
        # 5 steps move an element by 5e-3; AdamW divides near-zero gradients by their own size, noise included.
        torch.testing.assert_close(tensor.detach(), want[f"final.{name}"], atol=5e-5, rtol=0, msg=name)
        if name not in trainer.trainable:
            assert torch.equal(tensor, before[name]) and torch.equal(tensor, want[f"final.{name}"]), name


def test_placeholders_must_match(golden_dir: Path) -> None:
    model, want = load(golden_dir, "mono_tiny/forward")
    with pytest.raises(ValueError, match="12 placeholders for 16"):
        model.forward(want["input_ids"][:, :18], pixel_values=want["pixel_values"])
