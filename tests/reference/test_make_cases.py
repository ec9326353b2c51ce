"""Made cases have the layout of the golden ones, and mean something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from tests.reference.make_cases import make_case  # noqa: E402


def layout(path: Path) -> set[tuple[str, torch.dtype, int]]:
    """Key, dtype and rank of every tensor, numbered keys counted once."""
    tensors = load_file(path)
    return {(re.sub(r"\d+", "#", name, count=1), tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("what", "kind", "golden"),
    [
        ("forward", "mono", "mono_tiny/forward"),
        ("forward", "modular", "modular_tiny/forward"),
        ("generate", "mono", "mono_tiny/generate"),
        ("train", "mono", "mono_tiny/train_S2"),
    ],
)
def test_layout_is_that_of_the_golden_cases(
    golden_dir: Path, tmp_path: Path, what: str, kind: str, golden: str
) -> None:
    rows = ("tIItt",) if what == "generate" else ("tIItt", "tIt")
    path = make_case(tmp_path, kind=kind, what=what, rows=rows)
    assert layout(path) == layout(golden_dir / f"{golden}.safetensors")
    model = golden_dir / golden.split("/")[0] / "model.safetensors"
    assert layout(tmp_path / "model.safetensors") == layout(model)


def test_rows_flags_and_labels(tmp_path: Path) -> None:
    case = load_file(make_case(tmp_path, rows=("tIt", "tt", "IItt"), gradients=False))
    image = [100] * 4
    assert case["attention_mask"].sum(1).tolist() == [7, 3, 11]
    assert case["input_ids"][0, 2:6].tolist() == image and case["input_ids"][2, 1:9].tolist() == image * 2
    assert case["image_flags"].flatten().tolist() == [1, 0, 1, 1] and len(case["pixel_values"]) == 4
    assert case["position_ids"][1].tolist() == [0, 1, 2, *[2] * 8]
    trained = case["labels"] != -100
    assert not (trained & (case["input_ids"] == 100)).any()
    after_image = torch.roll(case["input_ids"] == 100, 1, dims=1)
    assert not (trained & after_image).any() and trained.any()


def test_a_case_is_a_function_of_its_seed(tmp_path: Path) -> None:
    cases = [
        load_file(make_case(tmp_path / str(i), kind="mono15", seed=seed, gradients=False))
        for i, seed in enumerate([0, 0, 1])
    ]
    assert torch.equal(cases[0]["logits"], cases[1]["logits"])
    assert not torch.equal(cases[0]["logits"], cases[2]["logits"])


def test_generation_rows_must_have_one_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one length"):
        make_case(tmp_path, what="generate", rows=("tIt", "tt"))
