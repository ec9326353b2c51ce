"""A plain PyTorch form of the same models, straight from a Hugging Face folder.

It is the reference: it follows the papers' equations in the naive way (both experts run on all tokens
and a mask selects, paper eq. 4-5; logits at every position) and shares no code with ``mono_jax``.
Tests compare with its numbers, ``train_step.py`` with its speed. PyTorch is optional: nothing else in
the packages imports this module.

Shapes: B rows, L positions, d model width, N image tiles, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Cache = list[tuple[Tensor, Tensor]]

# Substrings of the names of the parameters trained in each stage (Mono-InternVL, section 3.3; ++ = EViP++ of 1.5,
# where the visual attention experts join the visual parameters).
_VISUAL, _VISUAL_PLUS = ("vision_model.", "mlp1.", "feed_forward_ve."), ("wqkv_ve.",)
_ATTENTION = ("attention.wqkv.", "attention.wo.")
TRAINABLE: dict[str, tuple[str, ...]] = {
    "S1.1": _VISUAL,
    "S1.2": _VISUAL,
    "S1.3": _VISUAL + _ATTENTION,
    "S2": ("",),
    "S1.1++": _VISUAL + _VISUAL_PLUS,
    "S1.2++": _VISUAL + _VISUAL_PLUS,
    "S1.3++": _VISUAL + _VISUAL_PLUS + _ATTENTION,
    "S2++": ("",),
}


@dataclasses.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
      logits: [B, L, vocabulary].
      loss: mean cross entropy of the labels that are not -100, shifted by one; None without labels.
      hidden_states: embeddings, then each layer's output, the last one after the final norm; [B, L, d] each.
      attentions: probabilities [B, heads, L, L] of each layer; empty unless asked for.
    """

    logits: Tensor
    loss: Tensor | None
    hidden_states: list[Tensor]
    attentions: list[Tensor]


class TorchModel:
    """Mono-InternVL (1.0 and 1.5), modular InternVL or dense InternLM2 over a dict of named tensors.

    The config (``vision_config.model_type``) and the tensors that exist (``feed_forward_ve``, ``attention.wqkv_ve``)
    determine which of them it is.

    Args:
      config: the parsed ``config.json``; for a dense model, that of the language model only.
      tensors: parameters by their names in the checkpoint; all of one dtype, which the computation uses.
      image_token: id of the placeholder ``<IMG_CONTEXT>``.
      remat: recompute each language layer in the backward pass.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], image_token: int = 100, remat: bool = False
    ):
        self.config, self.llm = config, config.get("llm_config", config)
        self.vision = config.get("vision_config")
        self.tensors, self.image_token, self.remat = dict(tensors), image_token, remat
        self.prefix = "language_model." if "llm_config" in config else ""

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> TorchModel:
        """Reads ``config.json`` and ``model.safetensors`` of a folder, in float32."""
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
        return cls(config, {name: tensor.float() for name, tensor in tensors.items()}, **options)

    # ------------------------------------------------------------------ small pieces

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return self.tensors[f"{name}.weight"] * normed.to(x.dtype)

    def _layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    # ------------------------------------------------------------------ vision

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [N, tokens per tile, d] of normalised tiles [N, 3, H, W] (paper eq. 1)."""
        x = self._patch_embedding(pixel_values)
        rows, columns = (size // self.vision["patch_size"] for size in pixel_values.shape[-2:])
        if self.vision["model_type"] != "intern_vit_patch":
            x = self._vision_transformer(x)
        x = self._pixel_shuffle(x[:, 1:].unflatten(1, (rows, columns)))
        x = self._layer_norm(x.flatten(1, 2), "mlp1.0", 1e-5)
        return self._linear(F.gelu(self._linear(x, "mlp1.1")), "mlp1.3")

    def _patch_embedding(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches with their positional embedding, [N, 1 + patches, width]."""
        name = "vision_model.embeddings."
        weight, bias = (self.tensors[f"{name}patch_embedding.{part}"] for part in ("weight", "bias"))
        patches = F.conv2d(pixel_values.to(weight.dtype), weight, bias, stride=weight.shape[-1])
        positions = self.tensors[f"{name}position_embedding"]
        side = self.vision["image_size"] // self.vision["patch_size"]
        grid = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if patches.shape[-2:] != grid.shape[-2:]:
            grid = F.interpolate(grid, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        patches = (patches + grid.to(patches.dtype)).flatten(2).transpose(1, 2)
        first = self.tensors[f"{name}class_embedding"] + positions[:, :1]
        return torch.cat([first.expand(len(patches), -1, -1), patches], dim=1)

    def _pixel_shuffle(self, x: Tensor) -> Tensor:
        """[N, H, W, C] to [N, H/r, W/r, C r r]; the old version "v1" leaves the map transposed."""
        r = round(1 / self.config["downsample_ratio"])
        n, height, width, channels = x.shape
        x = x.reshape(n, height // r, r, width // r, r, channels)
        order = (0, 3, 1, 2, 4, 5) if self.config["ps_version"] == "v1" else (0, 1, 3, 2, 4, 5)
        x = x.permute(*order)
        return x.reshape(n, x.shape[1], x.shape[2], r * r * channels)

    def _vision_transformer(self, x: Tensor) -> Tensor:
        """InternViT's blocks, [N, 1 + patches, width]; returns the output selected by ``select_layer``."""
        states = [x]
        for layer in range(self.vision["num_hidden_layers"]):
            states.append(self._vision_block(states[-1], f"vision_model.encoder.layers.{layer}."))
        return states[self.config["select_layer"]]

    def _vision_block(self, x: Tensor, name: str) -> Tensor:
        eps, heads = self.vision["layer_norm_eps"], self.vision["num_attention_heads"]
        norm = self._rms_norm if self.vision["norm_type"] == "rms_norm" else self._layer_norm
        q, k, v = self._linear(norm(x, f"{name}norm1", eps), f"{name}attn.qkv").chunk(3, dim=-1)
        if self.vision["qk_normalization"]:
            q, k = self._rms_norm(q, f"{name}attn.q_norm", eps), self._rms_norm(k, f"{name}attn.k_norm", eps)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self._linear(mixed, f"{name}attn.proj") * self.tensors[f"{name}ls1"]
        activation = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[self.vision["hidden_act"]]
        hidden = activation(self._linear(norm(x, f"{name}norm2", eps), f"{name}mlp.fc1"))
        return x + self._linear(hidden, f"{name}mlp.fc2") * self.tensors[f"{name}ls2"]

    # ------------------------------------------------------------------ language

    def _rotation(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, 1, L, head size] of the rotary embedding for a sequence of ``length``."""
        size = self.llm["hidden_size"] // self.llm["num_attention_heads"]
        scaling, longest = self.llm.get("rope_scaling") or {"type": "none"}, self.llm["max_position_embeddings"]
        base, steps = float(self.llm["rope_theta"]), positions.float()
        if scaling["type"] == "linear":
            steps = steps / scaling["factor"]
        elif scaling["type"] == "dynamic" and length > longest:
            base *= (scaling["factor"] * length / longest - (scaling["factor"] - 1)) ** (size / (size - 2))
        inverse = 1.0 / base ** (torch.arange(0, size, 2, device=positions.device).float() / size)
        angles = (steps[..., None] * inverse).repeat(1, 1, 2)[:, None]
        dtype = self.tensors[f"{self.prefix}output.weight"].dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _by_modality(self, x: Tensor, visual: Tensor, text_expert: Any, visual_expert: Any) -> Tensor:
        """Both experts on all tokens; ``visual`` [B, L] selects."""
        return torch.where(visual[..., None], visual_expert(x), text_expert(x))

    def _ffn(self, x: Tensor, name: str) -> Tensor:
        return self._linear(F.silu(self._linear(x, f"{name}.w1")) * self._linear(x, f"{name}.w3"), f"{name}.w2")

    def _qkv(self, x: Tensor, visual: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, L, size], keys and values [B, KV heads, L, size]."""
        projected = functools.partial(self._linear, name=f"{name}.wqkv")
        if f"{name}.wqkv_ve.weight" in self.tensors:
            qkv = self._by_modality(x, visual, projected, functools.partial(self._linear, name=f"{name}.wqkv_ve"))
        else:
            qkv = projected(x)
        heads, kv_heads = self.llm["num_attention_heads"], self.llm["num_key_value_heads"]
        # One block per KV head: its group of queries, then its key, then its value.
        qkv = qkv.unflatten(-1, (kv_heads, heads // kv_heads + 2, -1))
        return (
            qkv[..., :-2, :].flatten(2, 3).transpose(1, 2),
            qkv[..., -2, :].transpose(1, 2),
            qkv[..., -1, :].transpose(1, 2),
        )

    def _layer(
        self,
        x: Tensor,
        visual: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        layer: int,
        want_attention: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """One decoder layer (paper eq. 2-3): new x, the keys and values so far, the probabilities if wanted."""
        name, eps = f"{self.prefix}model.layers.{layer}.", self.llm["rms_norm_eps"]
        q, k, v = self._qkv(self._rms_norm(x, f"{name}attention_norm", eps), visual, f"{name}attention")
        cos, sin = rotation
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        group = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        probabilities = None
        if want_attention:
            scores = (q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5).float()
            probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            mixed = probabilities.to(values.dtype) @ values
        else:
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None)
        x = x + self._linear(mixed.transpose(1, 2).flatten(2), f"{name}attention.wo")
        normed, text_ffn = (
            self._rms_norm(x, f"{name}ffn_norm", eps),
            functools.partial(self._ffn, name=f"{name}feed_forward"),
        )
        if f"{name}feed_forward_ve.w1.weight" in self.tensors:
            visual_ffn = functools.partial(self._ffn, name=f"{name}feed_forward_ve")
            return x + self._by_modality(normed, visual, text_ffn, visual_ffn), (k, v), probabilities
        return x + text_ffn(normed), (k, v), probabilities

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_flags: Tensor | None) -> Tensor:
        """Token embeddings [B, L, d]; placeholders get the visual tokens of the flagged tiles, in order."""
        x = F.embedding(input_ids, self.tensors[f"{self.prefix}model.tok_embeddings.weight"])
        if pixel_values is None:
            return x
        tokens = self.visual_tokens(pixel_values)
        if image_flags is not None:
            tokens = tokens[image_flags.flatten() == 1]
        visual = input_ids == self.image_token
        if int(visual.sum()) != tokens.shape[0] * tokens.shape[1]:
            raise ValueError(f"{int(visual.sum())} placeholders for {tokens.shape[0] * tokens.shape[1]} visual tokens")
        return x.masked_scatter(visual[..., None], tokens)

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attentions: bool = False,
        cache: Cache | None = None,
    ) -> Output:
        """Runs the model on rows padded on the right.

        Args:
          input_ids: int64 [B, L].
          pixel_values: normalised tiles [N, 3, H, W] in reading order over the batch.
          image_flags: [N] or [N, 1]; 0 marks a tile that belongs to no row. All 1 if absent.
          attention_mask: [B, L], 1 = real; all real if absent.
          position_ids: [B, L]; consecutive if absent.
          labels: [B, L], -100 = not trained on.
          attentions: also return the attention probabilities.
          cache: keys and values of previous tokens, already rotated; extended in place. Pass an empty
            list to start one. Cannot be combined with ``attention_mask``.
        """
        past = cache[0][0].shape[2] if cache else 0
        length = past + input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, length, device=input_ids.device).expand(input_ids.shape)
        mask = None
        if attention_mask is not None or attentions or past:
            rows = torch.arange(past, length, device=input_ids.device)[:, None]
            mask = (rows >= torch.arange(length, device=input_ids.device))[None, None]
            if attention_mask is not None:
                mask = mask & attention_mask.bool()[:, None, None]
        visual, rotation = input_ids == self.image_token, self._rotation(position_ids, length)
        states, probabilities = [self.embed(input_ids, pixel_values, image_flags)], []
        for layer in range(self.llm["num_hidden_layers"]):
            run = functools.partial(checkpoint, self._layer, use_reentrant=False) if self.remat else self._layer
            x, kv, attention = run(
                states[-1], visual, rotation, mask, cache[layer] if past else None, layer, attentions
            )
            states.append(x)
            probabilities.append(attention)
            if cache is not None:
                cache[layer : layer + 1] = [kv]
        states[-1] = self._rms_norm(states[-1], f"{self.prefix}model.norm", self.llm["rms_norm_eps"])
        logits = self._linear(states[-1], f"{self.prefix}output").float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return Output(logits, loss, states, probabilities if attentions else [])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy continuation: token ids [B, steps], and the logits [B, steps, vocabulary] from which they were chosen.

        Rows have equal lengths; the image placeholder is never chosen; nothing stops early.
        """
        cache: Cache = []
        logits = self.forward(input_ids, pixel_values=pixel_values, cache=cache).logits[:, -1]
        tokens, all_logits = [], []
        for step in range(steps):
            all_logits.append(logits)
            allowed = logits.clone()
            allowed[:, self.image_token] = float("-inf")
            tokens.append(allowed.argmax(-1))
            if step + 1 < steps:
                logits = self.forward(tokens[-1][:, None], cache=cache).logits[:, -1]
        return torch.stack(tokens, dim=1), torch.stack(all_logits, dim=1)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class TorchTrainer:
    """AdamW over the parameters that a stage trains; the others never enter the graph.

    Args:
      model: its tensors are trained in place.
      stage: a key of ``TRAINABLE``.
      learning_rate, betas, eps: AdamW's, constant.
      weight_decay: on tensors with more than one dimension.
      clip: largest gradient norm over the trainable parameters.
    """

    def __init__(
        self,
        model: TorchModel,
        stage: str,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ):
        self.model, self.clip = model, clip
        self.trainable: dict[str, Tensor] = {}
        for name, tensor in model.tensors.items():
            tensor.requires_grad_(any(part in name for part in TRAINABLE[stage]))
            if tensor.requires_grad:
                self.trainable[name] = tensor
        groups: Iterable[dict[str, Any]] = [
            {"params": [t for t in self.trainable.values() if t.ndim > 1], "weight_decay": weight_decay},
            {"params": [t for t in self.trainable.values() if t.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)

    def step(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """One update on the arguments of ``TorchModel.forward``; the loss and the gradient norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.forward(**batch).loss
        loss.backward()
        for tensor in self.trainable.values():
            if tensor.grad is None:  # unused in this batch: a zero gradient, so that it still decays
                tensor.grad = torch.zeros_like(tensor)
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.clip)
        self.optimizer.step()
        return loss.detach(), norm
