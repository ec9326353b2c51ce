"""The layers of mono-jax's models in PyTorch: one transformer for all families of language models.

``a`` is the architecture: which parts a model has. ``SPELLINGS`` gives their names in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rotary_mono_jax import rotate

# Part -> its name in a family's checkpoints.
_LLAMA = {
    "embed": "embed_tokens",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "out": "o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
_INTERNLM2 = {
    "embed": "tok_embeddings",
    "head": "output",
    "attention_norm": "attention_norm",
    "attention": "attention",
    "out": "wo",
    "ffn_norm": "ffn_norm",
    "ffn": "feed_forward",
    "gate": "w1",
    "up": "w3",
    "down": "w2",
}
_GEMMA3 = _LLAMA | {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
SPELLINGS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA) | {
    "internlm2": _INTERNLM2,
    "gemma3": _GEMMA3,
}


@dataclass
class Seen:
    """What layers of one kind need: ``mask`` bool [B, 1, Q, K], and the RoPE angles [B, Q, 1, D / 2]."""

    mask: Tensor
    cosines: Tensor
    sines: Tensor


@dataclass
class Places:
    """Row indices of text and visual tokens among the B * Q tokens of a call; ``visual`` None: all are text."""

    text: Tensor | None = None
    visual: Tensor | None = None


def by_modality(
    text: Callable[[Tensor], Tensor], visual: Callable[[Tensor], Tensor] | None, x: Tensor, places: Places
) -> Tensor:
    """``text`` of the text rows of x [N, d] and ``visual`` of the visual rows; ``text`` of all if there are none."""
    if visual is None or places.visual is None:
        return text(x)
    of_text, of_visual = text(x[places.text]), visual(x[places.visual])
    y = of_text.new_empty(len(x), *of_text.shape[1:])
    return y.index_copy(0, places.text, of_text).index_copy(0, places.visual, of_visual)


class RMSNorm(nn.Module):
    """Statistics in float32, then times the weight; ``offset`` (Gemma): times 1 + weight, in float32."""

    def __init__(self, features: int, eps: float, offset: bool):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.zeros(features) if offset else torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + self.weight.float())).to(x.dtype) if self.offset else normed.to(x.dtype) * self.weight


def norm_of(a: SimpleNamespace, features: int) -> RMSNorm:
    return RMSNorm(features, a.rms_norm_eps, a.unit_offset_norms)


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, a: SimpleNamespace):
        super().__init__()
        self.names = SPELLINGS[a.family]
        self.act = F.silu if a.hidden_act == "silu" else lambda x: F.gelu(x, approximate="tanh")
        for part in ("gate", "up"):
            self.add_module(self.names[part], nn.Linear(a.hidden_size, a.intermediate_size, bias=False))
        self.add_module(self.names["down"], nn.Linear(a.intermediate_size, a.hidden_size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, self.names[part]) for part in ("gate", "up", "down"))
        return down(self.act(gate(x)) * up(x))


class Attention(nn.Module):
    """Grouped-query attention; with visual experts, visual tokens have separate weights for queries, keys and values.

    InternLM2 has one matrix for all three, whose rows are, for each KV head, its queries, its key and its value.
    """

    def __init__(self, a: SimpleNamespace):
        super().__init__()
        self.a, self.fused = a, a.family == "internlm2"
        self.scale = (a.query_pre_attn_scalar or a.head_dim) ** -0.5
        self.out = SPELLINGS[a.family]["out"]
        bias, query, key = a.bias or a.qkv_bias, a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        sizes = {"wqkv": query + 2 * key} if self.fused else {"q_proj": query, "k_proj": key, "v_proj": key}
        for suffix in ("", "_ve") if a.visual_attention_experts else ("",):
            for name, size in sizes.items():
                self.add_module(name + suffix, nn.Linear(a.hidden_size, size, bias=bias))
            if a.qk_norm:
                for name in ("q_norm", "k_norm"):
                    self.add_module(name + suffix, norm_of(a, a.head_dim))
        self.add_module(self.out, nn.Linear(query, a.hidden_size, bias=a.bias))

    def qkv(self, x: Tensor, suffix: str) -> Tensor:
        """Rows x [N, d] as [N, Hq + 2 * Hkv, D]: queries, keys, values; the first two normed if the model has norms."""
        a = self.a
        if self.fused:
            rows = getattr(self, "wqkv" + suffix)(x).unflatten(-1, (a.num_key_value_heads, -1, a.head_dim))
            query, key, value = rows[:, :, :-2].flatten(1, 2), rows[:, :, -2], rows[:, :, -1]
        else:
            parts = (getattr(self, name + suffix)(x) for name in ("q_proj", "k_proj", "v_proj"))
            query, key, value = (part.unflatten(-1, (-1, a.head_dim)) for part in parts)
        if a.qk_norm:
            query, key = getattr(self, "q_norm" + suffix)(query), getattr(self, "k_norm" + suffix)(key)
        return torch.cat([query, key, value], dim=1)

    def forward(self, x: Tensor, seen: Seen, places: Places, cache: Any, layer: int) -> Tensor:
        a, (rows, length, _) = self.a, x.shape
        visual = (lambda x: self.qkv(x, "_ve")) if a.visual_attention_experts else None
        heads = by_modality(lambda x: self.qkv(x, ""), visual, x.flatten(0, 1), places).unflatten(0, (rows, length))
        kv = a.num_key_value_heads
        query, key, value = heads.split([a.num_attention_heads, kv, kv], dim=2)
        query, key = rotate(query, seen.cosines, seen.sines), rotate(key, seen.cosines, seen.sines)
        return getattr(self, self.out)(self.mix(query, key, value, seen, cache, layer).flatten(2))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, cache: Any, layer: int) -> Tensor:
        """Attention of query [B, Q, Hq, D] over the cache, to which key and value [B, Q, Hkv, D] are added."""
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, layer)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen.mask, scale=self.scale)
        return mixed.transpose(1, 2)


class Layer(nn.Module):
    """One decoder layer; its visual FFN, if it has one, is next to the text FFN."""

    def __init__(self, a: SimpleNamespace, number: int):
        super().__init__()
        self.a, self.number, self.names = a, number, SPELLINGS[a.family]
        norms = ["attention_norm", "ffn_norm", *(["attention_post_norm", "ffn_post_norm"] if a.sandwich_norms else [])]
        for part in norms:
            self.add_module(self.names[part], norm_of(a, a.hidden_size))
        self.add_module(self.names["attention"], Attention(a))
        self.add_module(self.names["ffn"], GatedFFN(a))
        if a.visual_ffn_experts:
            self.add_module(self.names["ffn"] + "_ve", GatedFFN(a))

    def part(self, name: str, suffix: str = "") -> nn.Module:
        return getattr(self, self.names[name] + suffix)

    def forward(self, x: Tensor, seen: Seen, places: Places, cache: Any) -> Tensor:
        a = self.a
        y = self.part("attention")(self.part("attention_norm")(x), seen, places, cache, self.number)
        x = x + (self.part("attention_post_norm")(y) if a.sandwich_norms else y)
        visual = self.part("ffn", "_ve") if a.visual_ffn_experts else None
        normed = self.part("ffn_norm")(x)
        y = by_modality(self.part("ffn"), visual, normed.flatten(0, 1), places).view_as(x)
        return x + (self.part("ffn_post_norm")(y) if a.sandwich_norms else y)


class Decoder(nn.Module):
    """Token embedding, layers and final norm, which are stored together in checkpoints."""

    def __init__(self, a: SimpleNamespace):
        super().__init__()
        self.add_module(SPELLINGS[a.family]["embed"], nn.Embedding(a.vocab_size, a.hidden_size))
        self.layers = nn.ModuleList(Layer(a, n) for n in range(a.num_hidden_layers))
        self.norm = norm_of(a, a.hidden_size)


class PatchEmbedding(nn.Module):
    """Convolution and learned positions; ``class_embedding`` and the first position are kept, but not used."""

    def __init__(self, v: SimpleNamespace):
        super().__init__()
        self.v, grid = v, v.image_size // v.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, v.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + grid**2, v.hidden_size))
        self.patch_embedding = nn.Conv2d(v.num_channels, v.hidden_size, v.patch_size, v.patch_size)

    def forward(self, tiles: Tensor, cells: Tensor | None) -> Tensor:
        """tiles [N, 3, T, T] as visual tokens [N, tokens, s * s * C], each made of s x s patches.

        In native resolution each token is a tile; ``cells`` int [N, 4]: (row, column, rows, columns) in its image.
        """
        v = self.v
        x = self.patch_embedding(tiles.to(self.patch_embedding.weight.dtype))
        s = round(1 / v.downsample_ratio)
        positions = self.native_positions(cells, s) if getattr(v, "native", False) else self.positions(*x.shape[-2:])
        x = (x + positions.to(x.dtype)).unflatten(3, (-1, s)).unflatten(2, (-1, s))  # [N, C, h, s, w, s]
        order = (0, 2, 4, 3, 5, 1) if v.ps_version == "v2" else (0, 4, 2, 3, 5, 1)
        return x.permute(order).flatten(3).flatten(1, 2)

    def positions(self, rows: int, columns: int) -> Tensor:
        """[1, C, rows, columns] of patches; float32 if the stored grid is interpolated."""
        grid = self.v.image_size // self.v.patch_size
        stored = self.position_embedding[:, 1:].transpose(1, 2).unflatten(-1, (grid, grid))
        if (rows, columns) == (grid, grid):
            return stored
        return F.interpolate(stored.float(), (rows, columns), mode="bicubic", align_corners=False)

    def native_positions(self, cells: Tensor, s: int) -> Tensor:
        """float32 [N, C, s, s]: the positions of each token within its image."""
        found = self.position_embedding.new_empty(len(cells), self.v.hidden_size, s, s, dtype=torch.float32)
        for rows, columns in cells[:, 2:].unique(dim=0).tolist():
            whole = self.positions(rows * s, columns * s)[0].float().unflatten(2, (columns, s)).unflatten(1, (rows, s))
            chosen = (cells[:, 2] == rows) & (cells[:, 3] == columns)
            row, column = cells[chosen, :2].T
            found[chosen] = whole.permute(1, 3, 0, 2, 4)[row, column]  # [C, rows, s, columns, s]
        return found
