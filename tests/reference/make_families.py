"""Makes the golden cases of language model families with transformers: tiny random models and what they compute.

    python -m tests.reference.make_families tests/golden/families

A case is a folder with config.json and model.safetensors, as ``save_pretrained`` writes them, and expected.npz:
``tokens`` int32 [2, T], of each row ``logits`` float32 [2, T, vocabulary], ``hidden`` [L + 1, 2, T, d] (the last after
the final norm), ``greedy`` int32 [N] (what follows the first row), and ``gradients/NAME``: of the mean loss over next
tokens, for every tensor of the checkpoint. Weights are random: biases are not zero, norm scales not one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

LENGTH, NEW_TOKENS, SEED = 20, 8, 0
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
GEMMA_ROPE = {"full_attention": PLAIN | {"rope_theta": 5e3}, "sliding_attention": PLAIN}
# Name: (model_type of transformers, what differs from SIZES).
GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"rope_parameters": PLAIN, "sliding_window": 6, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN, "head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "rope_parameters": GEMMA_ROPE,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
}
# Further ones, which are compared where transformers is at hand.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"rope_parameters": LINEAR, "attention_bias": True}),
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8, "head_dim": 16}),
    "llama, yarn": ("llama", {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 1.5}}),
    "mistral, no window": ("mistral", {"rope_parameters": PLAIN, "sliding_window": None}),
    "qwen2, windows": (
        "qwen2",
        {"rope_parameters": PLAIN, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3, biases, tied": (
        "qwen3",
        {"rope_parameters": LLAMA3, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma3, linear, untied": (
        "gemma3_text",
        {
            "rope_parameters": GEMMA_ROPE | {"full_attention": LINEAR},
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
}


def tiny_model(model_type: str, changes: dict[str, Any], seed: int = SEED) -> Any:
    """A float32 model with random weights."""
    changes = json.loads(json.dumps(changes))  # transformers changes what it is given
    config = transformers.AutoConfig.for_model(model_type, **SIZES | changes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float("norm" in name and not model_type.startswith("gemma"))
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def expected(model: Any, seed: int = SEED) -> dict[str, np.ndarray]:
    """What ``model`` computes of two random rows; see above."""
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(3, SIZES["vocab_size"], (2, LENGTH), generator=generator)
    output = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False)
    output.loss.backward()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generation_config.eos_token_id = None
    greedy = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), **options)[0, LENGTH:]
    found = {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "hidden": torch.stack(output.hidden_states).detach().numpy(),
        "greedy": greedy.numpy().astype(np.int32),
    }
    return found | {f"gradients/{name}": p.grad.numpy() for name, p in model.named_parameters()}


def write_case(folder: Path, model_type: str, changes: dict[str, Any], **options: Any) -> Path:
    """``options`` go to ``save_pretrained``."""
    model = tiny_model(model_type, changes)
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    np.savez_compressed(folder / "expected.npz", **expected(model))
    return folder


if __name__ == "__main__":
    for name, (model_type, changes) in GOLDEN.items():
        write_case(Path(sys.argv[1]) / name, model_type, changes)
