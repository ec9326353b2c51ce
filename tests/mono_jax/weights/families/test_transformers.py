"""Side by side with transformers where it is installed (pip install -e .[families]); elsewhere see test_golden.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from mono_jax.weights.convert import convert  # noqa: E402
from tests.mono_jax.weights.families.compare import TOLERANCE, assert_equal  # noqa: E402
from tests.reference.make_families import GOLDEN, OTHERS, tiny_model, write_case  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.mark.parametrize("case", OTHERS)
def test_models_of_transformers_here(tmp_path: Path, case: str):
    folder = write_case(tmp_path / "model", *OTHERS[case])
    assert_equal(folder, dict(np.load(folder / "expected.npz")))


@pytest.mark.parametrize("name", GOLDEN)
def test_our_files_in_transformers(golden_dir: Path, tmp_path: Path, name: str):
    convert(golden_dir / "families" / name, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "exported", shard_size=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    expected = np.load(golden_dir / "families" / name / "expected.npz")
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"])).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_cases_are_of_these_models(golden_dir: Path, name: str):
    state, expected = tiny_model(*GOLDEN[name]).state_dict(), np.load(golden_dir / "families" / name / "expected.npz")
    for key in expected.files:
        if key.startswith("gradients/"):
            assert tuple(state[key.removeprefix("gradients/")].shape) == expected[key].shape
