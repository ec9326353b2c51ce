"""The same requests answered by transformers, from the exported model."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from mono_jax.errors import ConfigError
from mono_jax.generation.decode import Generator
from mono_jax.generation.prompts import check_prompt
from mono_jax.hf_export.layout import write_files
from mono_jax.models.layer_ranges import joined
from mono_jax.serving.contract import Request
from mono_jax.weights.convert import convert
from mono_jax.weights.model_folder import save_model


def compare(python: str, generator: Generator, requests: Sequence[Request], new_tokens: int) -> dict[str, Any]:
    """Answers of transformers to ``requests`` (of equal lengths), first one alone, then all in a batch, using the
    interpreter ``python``: {"alone", "together": {"seconds", "first_token_s", "tokens_per_s"}, "equal_answers"}.
    """
    config = generator.config
    prompts = [check_prompt(config, request.prompt, "") for request in requests]
    edge, size = config.vision.tile // config.vision.token_pixels, config.vision.tile
    tiles = np.concatenate([prompt.patches for prompt in prompts]).astype(np.float32) / 255
    tiles = ((tiles - IMAGENET_MEAN) / IMAGENET_STD).reshape(-1, edge, edge, size // edge, size // edge, 3)
    pixels = tiles.transpose(0, 5, 1, 3, 2, 4).reshape(-1, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, file = Path(folder) / "ours", Path(folder) / "theirs", Path(folder) / "requests.npz"
        save_model(ours, config, joined(generator.params, np.concatenate))
        convert(str(ours), str(theirs), own_layout=write_files, layout="own")
        np.savez(file, ids=np.stack([prompt.input_ids for prompt in prompts]), pixels=pixels.astype(np.float32))
        here = str(Path(__file__).parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import in_transformers as t; t.main(*sys.argv[1:])"
        command = [python, "-c", code, str(theirs), str(file), str(new_tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{python}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    answers = generator.generate([r.prompt for r in requests], [r.sampling for r in requests])
    same = sum(ours.tokens == theirs for ours, theirs in zip(answers, found.pop("tokens")))
    return found | {"equal_answers": same, "requests": len(requests)}
