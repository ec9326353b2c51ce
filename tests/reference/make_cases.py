"""Makes cases like those of ``tests/golden`` for other models, with the plain PyTorch form.

A case is a folder with ``config.json`` and ``model.safetensors`` in the Hugging Face layout and one
``forward.safetensors``, ``generate.safetensors`` or ``train_STAGE.safetensors`` with the golden
files' keys, dtypes and shapes (tests/golden says what they mean). Weights are random: biases are not
zero, norm scales not one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.benchmarks.step.torch_form import TorchModel, TorchTrainer

Kind = Literal["mono", "mono15", "modular", "dense"]

IMAGE_TOKEN, BOS, PAD = 100, 1, 2
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


def make_case(
    out_dir: Path,
    *,
    kind: Kind = "mono",
    what: Literal["forward", "generate", "train"] = "forward",
    rows: Sequence[str] = ("ttttIIttttttIttt", "tIttttt"),
    seed: int = 0,
    hidden: int = 48,
    layers: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    ffn: int = 80,
    vocab: int = 128,
    bias: bool = False,
    rope_theta: float = 1e6,
    rope_scaling: Mapping[str, Any] | None = None,
    max_position: int = 512,
    rms_norm_eps: float = 1e-5,
    patch: int = 14,
    image_size: int = 56,
    tile: int | None = None,
    ps_version: Literal["v1", "v2"] = "v2",
    vit_hidden: int = 32,
    vit_layers: int = 2,
    vit_heads: int = 4,
    vit_norm: Literal["layer_norm", "rms_norm"] = "layer_norm",
    qkv_bias: bool = True,
    qk_norm: bool = False,
    select_layer: int = -1,
    gradients: bool = True,
    steps: int = 5,
    stage: str = "S2",
    optimizer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a case and returns the path of its ``.safetensors`` file, which lies in ``out_dir``.

    Args:
      out_dir: the model's folder; made if it is missing.
      kind: Mono-InternVL 1.0 or 1.5, InternViT + InternLM2, or InternLM2 alone.
      what: outputs and gradients, greedy continuation, or AdamW steps.
      rows: one string per row, read from left to right after the BOS token: ``t`` = a text token, ``I`` = the
        visual tokens of one tile. Shorter rows are padded on the right; for "generate" all have one length.
      seed: of weights, tokens and pixels.
      image_size: edge in pixels of the tile that the positional grid is made for; ``tile``: edge of
        the tiles in the case (the same when None).
      gradients: whether a forward case has ``grad.NAME`` for every parameter.
      steps: generated tokens or optimizer steps.
      stage, optimizer: what trains, and keyword arguments of ``TorchTrainer``.
    """
    architecture = {"mono": "InternLM2VEForCausalLM", "mono15": "InternLM2VEAttentionForCausalLM"}
    llm = {
        "architectures": [architecture.get(kind, "InternLM2ForCausalLM")],
        "model_type": "internlm2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
        "bias": bias,
        "hidden_act": "silu",
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": PAD,
    }
    vision = {
        "model_type": "intern_vit_6b" if kind == "modular" else "intern_vit_patch",
        "hidden_size": vit_hidden,
        "intermediate_size": 2 * vit_hidden,
        "num_hidden_layers": vit_layers,
        "num_attention_heads": vit_heads,
        "num_channels": 3,
        "patch_size": patch,
        "image_size": image_size,
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "norm_type": vit_norm,
        "qkv_bias": qkv_bias,
        "qk_normalization": qk_norm,
    }
    config: dict[str, Any] = llm
    if kind != "dense":
        config = {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "force_image_size": tile or image_size,
            "downsample_ratio": 0.5,
            "ps_version": ps_version,
            "select_layer": select_layer,
            "template": "internlm2-chat",
            "dynamic_image_size": True,
            "use_thumbnail": True,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": 6,
            "vision_config": vision,
            "llm_config": llm,
        }
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(config, kind, generator)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, out_dir / "model.safetensors")

    model = TorchModel(config, tensors, image_token=IMAGE_TOKEN)
    edge = (tile or image_size) if kind != "dense" else None

    def batch(flags: bool) -> dict[str, Tensor]:
        return random_batch(rows, vocab, edge, ((edge or 0) // (2 * patch)) ** 2, generator, flags)

    if what == "forward":
        case, name = forward_case(model, batch(flags=True), gradients), "forward"
    elif what == "generate":
        case, name = generate_case(model, batch(flags=False), steps), "generate"
    else:
        batches = [batch(flags=False) for _ in range(steps)]
        case, name = train_case(model, batches, stage, optimizer or {}), f"train_{stage}"
    path = out_dir / f"{name}.safetensors"
    save_file({key: tensor.detach().contiguous() for key, tensor in case.items()}, path)
    return path


def random_tensors(config: Mapping[str, Any], kind: Kind, generator: torch.Generator) -> dict[str, Tensor]:
    """Random float32 parameters by their names in the checkpoint."""
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, mean: float = 0.0, spread: float = 0.1) -> None:
        tensors[name] = mean + spread * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, width: int, bias: bool) -> None:
        draw(f"{name}.weight", out, width, spread=0.7 / width**0.5)
        if bias:
            draw(f"{name}.bias", out)

    def norm(name: str, width: int, bias: bool) -> None:
        draw(f"{name}.weight", width, mean=1.0)
        if bias:
            draw(f"{name}.bias", width)

    llm = config.get("llm_config", config)
    d, ffn, heads, kv_heads = (
        llm[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    experts, prefix = kind in ("mono", "mono15"), "" if kind == "dense" else "language_model."
    for layer in range(llm["num_hidden_layers"]):
        name = f"{prefix}model.layers.{layer}."
        for qkv in ("wqkv", "wqkv_ve") if kind == "mono15" else ("wqkv",):
            linear(f"{name}attention.{qkv}", (heads + 2 * kv_heads) * d // heads, d, llm["bias"])
        linear(f"{name}attention.wo", d, d, llm["bias"])
        for expert in ("feed_forward", "feed_forward_ve") if experts else ("feed_forward",):
            linear(f"{name}{expert}.w1", ffn, d, bias=False)
            linear(f"{name}{expert}.w3", ffn, d, bias=False)
            linear(f"{name}{expert}.w2", d, ffn, bias=False)
        norm(f"{name}attention_norm", d, bias=False)
        norm(f"{name}ffn_norm", d, bias=False)
    norm(f"{prefix}model.norm", d, bias=False)
    draw(f"{prefix}model.tok_embeddings.weight", llm["vocab_size"], d, spread=0.3)
    linear(f"{prefix}output", llm["vocab_size"], d, bias=False)
    if kind == "dense":
        return tensors

    vision = config["vision_config"]
    width, patch = vision["hidden_size"], vision["patch_size"]
    name = "vision_model.embeddings."
    draw(f"{name}class_embedding", 1, 1, width, spread=1.0)
    draw(f"{name}position_embedding", 1, 1 + (vision["image_size"] // patch) ** 2, width, spread=1.0)
    draw(f"{name}patch_embedding.weight", width, 3, patch, patch, spread=0.02)
    draw(f"{name}patch_embedding.bias", width)
    norm("mlp1.0", 4 * width, bias=True)
    linear("mlp1.1", d, 4 * width, bias=True)
    linear("mlp1.3", d, d, bias=True)
    if kind != "modular":
        return tensors

    for layer in range(vision["num_hidden_layers"]):
        name = f"vision_model.encoder.layers.{layer}."
        for part in ("norm1", "norm2"):
            norm(name + part, width, bias=vision["norm_type"] == "layer_norm")
        linear(f"{name}attn.qkv", 3 * width, width, vision["qkv_bias"])
        linear(f"{name}attn.proj", width, width, bias=True)
        linear(f"{name}mlp.fc1", vision["intermediate_size"], width, bias=True)
        linear(f"{name}mlp.fc2", width, vision["intermediate_size"], bias=True)
        if vision["qk_normalization"]:
            norm(f"{name}attn.q_norm", width, bias=False)
            norm(f"{name}attn.k_norm", width, bias=False)
        for scale in ("ls1", "ls2"):
            draw(name + scale, width, mean=0.5)
    return tensors


def random_batch(
    rows: Sequence[str],
    vocab: int,
    edge: int | None,
    tile_tokens: int,
    generator: torch.Generator,
    flags: bool,
) -> dict[str, Tensor]:
    """Rows after ``rows`` (see ``make_case``) with random text and pixels, as int64 and float32.

    With ``flags``, as in the public release, a text-only row brings a tile that is not used (flag 0).
    A label hangs on about four of five text tokens, never on the first one after an image.
    """
    ids, labels, image_flags = [], [], []
    choices = torch.tensor([token for token in range(3, vocab) if token != IMAGE_TOKEN])
    for row in rows:
        tokens, targets = [BOS], [-100]
        for i, symbol in enumerate(row):
            if symbol == "I":
                tokens += [IMAGE_TOKEN] * tile_tokens
                targets += [-100] * tile_tokens
            else:
                token = int(choices[torch.randint(len(choices), (), generator=generator)])
                trained = row[i - 1 : i] != "I" and bool(torch.rand((), generator=generator) < 0.8)
                tokens.append(token)
                targets.append(token if trained else -100)
        ids.append(tokens)
        labels.append(targets)
        image_flags += [1] * row.count("I") or ([0] if flags else [])
    length = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    case = {
        "input_ids": torch.tensor([row + [PAD] * (length - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        "attention_mask": mask,
        "position_ids": mask.cumsum(1) - 1,
    }
    if edge is not None:
        case["pixel_values"] = torch.randn((len(image_flags), 3, edge, edge), generator=generator)
        if flags:
            case["image_flags"] = torch.tensor(image_flags)[:, None]
    return case


def forward_case(model: TorchModel, batch: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """Inputs, logits, loss, hidden states, attentions and, if wanted, every gradient."""
    for tensor in model.tensors.values():
        tensor.requires_grad_(gradients)
    out = model.forward(**batch, attentions=True)
    case = dict(batch)
    case |= {f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)}
    case |= {f"attentions.{i}": attention for i, attention in enumerate(out.attentions)}
    case |= {"logits": out.logits, "loss": out.loss[None]}
    if gradients:
        out.loss.backward()
        for name, tensor in model.tensors.items():
            case[f"grad.{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return case


def generate_case(model: TorchModel, batch: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Prompt, greedy continuation and the logits of its steps."""
    if not batch["attention_mask"].all():
        raise ValueError("rows of a generation case must have one length")
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values") if name in batch}
    tokens, logits = model.generate(inputs["input_ids"], inputs.get("pixel_values"), steps)
    return inputs | {"generated": tokens, "step_logits": logits}


def train_case(
    model: TorchModel, batches: Sequence[dict[str, Tensor]], stage: str, optimizer: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The batches, the losses and gradient norms of one AdamW step on each, and the parameters at the end."""
    trainer = TorchTrainer(model, stage, **optimizer)
    results = [trainer.step(**batch) for batch in batches]
    case = {f"step{i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()}
    case["losses"] = torch.stack([loss for loss, _ in results])
    case["grad_norms"] = torch.stack([norm for _, norm in results])
    return case | {f"final.{name}": tensor for name, tensor in model.tensors.items()}
