"""mono-jax models in PyTorch: a language model, optionally with vision and visual experts.

A token is visual if its id is ``image_token_id``, in a prompt as in any later turn; each expert computes only the
tokens of its own modality.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_mono_jax import MonoJaxConfig
from .layers_mono_jax import SPELLINGS, Decoder, PatchEmbedding, Places, Seen
from .rotary_mono_jax import rotary


@dataclass
class MonoJaxOutput(ModelOutput):
    """``cache`` and ``past_key_values`` are the same: transformers renamed it in 5.x."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


class MonoJaxPreTrainedModel(PreTrainedModel):
    config_class = MonoJaxConfig
    base_model_prefix = ""
    _no_split_modules = ("Layer",)
    _supports_cache_class = True  # transformers 4
    _supports_sdpa = True
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class MonoJaxForCausalLM(MonoJaxPreTrainedModel, GenerationMixin):
    """Logits of the next token for texts with images, and ``generate``."""

    def __init__(self, config: MonoJaxConfig):
        super().__init__(config)
        self.a = a = SimpleNamespace(**config.architecture)
        a.head_dim = a.head_size or a.hidden_size // a.num_attention_heads
        language = nn.Module()
        language.model = Decoder(a)
        if not a.tie_word_embeddings:
            language.add_module(SPELLINGS[a.family]["head"], nn.Linear(a.hidden_size, a.vocab_size, bias=False))
        if a.vision is None:
            for name, module in list(language.named_children()):
                self.add_module(name, module)
        else:
            self.language_model = language
            v = SimpleNamespace(**a.vision)
            width = v.hidden_size * round(1 / v.downsample_ratio) ** 2
            self.native = getattr(v, "native", False)
            tile = (v.tile_size or v.image_size) // round(v.patch_size / v.downsample_ratio)
            self.tile_tokens = 1 if self.native else tile**2  # in native resolution each token is a tile
            self.vision_model = nn.Module()
            self.vision_model.embeddings = PatchEmbedding(v)
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, a.hidden_size), nn.GELU(), nn.Linear(a.hidden_size, a.hidden_size)
            )
        self.post_init()

    @property
    def _language(self) -> nn.Module:
        return self if self.a.vision is None else self.language_model

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self._language.model, SPELLINGS[self.a.family]["embed"])

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self._language.model, SPELLINGS[self.a.family]["embed"], value)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.a.tie_word_embeddings else getattr(self._language, SPELLINGS[self.a.family]["head"])

    def set_output_embeddings(self, value: nn.Module) -> None:
        setattr(self._language, SPELLINGS[self.a.family]["head"], value)

    def embed(
        self, input_ids: Tensor, visual: Tensor, pixel_values: Tensor | None, pixel_cells: Tensor | None
    ) -> Tensor:
        """x [B, Q, d]; the rows of ``visual`` (bool [B, Q]) come from the tiles, in order."""
        x = self.embed_text(input_ids)
        tiles, wanted = 0 if pixel_values is None else len(pixel_values), int(visual.sum())
        given = tiles * getattr(self, "tile_tokens", 0)
        if given != wanted or (tiles and not given):
            raise ValueError(f"{wanted} image placeholders in input_ids, but {tiles} tiles of {given} visual tokens")
        if not wanted:
            return x
        if self.native and (pixel_cells is None or len(pixel_cells) != tiles):
            raise ValueError("pixel_cells: this model takes images in native resolution; pass the processor's")
        return x.masked_scatter(visual[..., None], self.embed_images(pixel_values, pixel_cells).to(x.dtype))

    def embed_text(self, input_ids: Tensor) -> Tensor:
        x = self.get_input_embeddings()(input_ids)
        return x * torch.tensor(self.a.hidden_size**0.5, dtype=x.dtype) if self.a.scale_embeddings else x

    def embed_images(self, pixel_values: Tensor, pixel_cells: Tensor | None) -> Tensor:
        """[tiles, tokens per tile, d]."""
        return self.mlp1(self.vision_model.embeddings(pixel_values, pixel_cells))

    def logits(self, x: Tensor) -> Tensor:
        """float32 [..., vocabulary] of normalised hidden states."""
        head = self.get_output_embeddings()
        return F.linear(x, self.get_input_embeddings().weight if head is None else head.weight).float()

    def seen(self, mask: Tensor, visual: Tensor, sliding: bool) -> Seen:
        """``mask`` [B, K]: 1 for keys that are not padding; ``visual`` bool [B, Q]: of the last Q, new tokens."""
        a, new = self.a, visual.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ahead = positions[:, None, :] - positions[:, -new:, None]  # of key before query, [B, Q, K]
        sees = ahead <= 0
        if a.bidirectional_images:  # images come whole: their tokens are adjacent, in one call
            image = F.pad(visual.long(), (1, 0)).diff(dim=1).clamp(min=0).cumsum(1) * visual
            same = (image[:, :, None] == image[:, None, :]) & visual[:, :, None]
            sees = torch.cat([sees[..., :-new], sees[..., -new:] | same], dim=-1)
        if sliding:
            sees = sees & (-ahead < a.sliding_window)
        itself = torch.arange(mask.shape[1], device=mask.device) == torch.arange(
            mask.shape[1] - new, mask.shape[1], device=mask.device
        ).unsqueeze(1)
        sees = (sees & mask.bool()[:, None, :]) | itself  # padding sees itself: no row without keys, no NaN
        cosines, sines = rotary(a, positions[:, -new:], mask.sum(-1), sliding)
        return Seen(sees[:, None], cosines[:, :, None], sines[:, :, None])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_cells: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MonoJaxOutput | tuple:
        """input_ids [B, Q] are the tokens after those in the cache; attention_mask [B, K] covers all.

        pixel_values [tiles, 3, T, T]: normalised tiles of the images whose placeholders are in input_ids, row by row.
        In native resolution [tokens, 3, P, P], and pixel_cells int [tokens, 4] gives the place of each token: its row,
        its column, and the number of rows and columns of its image.
        labels [B, Q]: the ids themselves, -100 where they are not trained on.
        """
        a = self.a
        if output_attentions:
            raise ValueError("output_attentions: this model does not keep them")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        visual = (
            input_ids == a.image_token_id if a.vision is not None else torch.zeros_like(input_ids, dtype=torch.bool)
        )
        x = self.embed(input_ids, visual, pixel_values, pixel_cells)
        flat, places = visual.flatten(), Places()
        if bool(flat.any()):
            places = Places((~flat).nonzero()[:, 0], flat.nonzero()[:, 0])
        kinds = {n in a.sliding_layers for n in range(a.num_hidden_layers)}
        seen = {sliding: self.seen(attention_mask, visual, sliding) for sliding in kinds}
        hidden = [x]
        for n, layer in enumerate(self._language.model.layers):
            x = layer(x, seen[n in a.sliding_layers], places, cache)
            hidden.append(x)
        x = hidden[-1] = self._language.model.norm(x)
        logits = self.logits(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        output = MonoJaxOutput(loss, logits, cache, cache, tuple(hidden) if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_cells: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that are not in the cache yet, and the tiles of their images.

        A further turn may pass all ids and the tiles of all images, or only those of its new images.
        """
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else cache.get_seq_length()
        new = (input_ids if attention_mask is None else attention_mask).shape[1] - past
        fresh = input_ids[:, -new:]
        if pixel_values is not None:
            columns = (input_ids == self.a.image_token_id).nonzero()[:, 1]
            if len(columns) == len(pixel_values) * self.tile_tokens:
                of_fresh = columns[:: self.tile_tokens] >= input_ids.shape[1] - new
                pixel_values = pixel_values[of_fresh]
                pixel_cells = None if pixel_cells is None else pixel_cells[of_fresh]
            if not (fresh == self.a.image_token_id).any():
                pixel_values = pixel_cells = None
        keys = ("use_cache", "logits_to_keep", "output_hidden_states")
        inputs = {"input_ids": fresh, "attention_mask": attention_mask, "cache": cache}
        inputs |= {"pixel_values": pixel_values, "pixel_cells": pixel_cells}
        return inputs | {key: kwargs[key] for key in keys if kwargs.get(key) is not None}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Several answers to each row: the tiles of a row are repeated together."""
        tiles = {key: kwargs.pop(key, None) for key in ("pixel_values", "pixel_cells")}
        tiles = {key: values for key, values in tiles.items() if values is not None}
        if tiles and expand_size > 1:
            counts = ((input_ids == self.a.image_token_id).sum(1) // self.tile_tokens).tolist()
            for key, values in tiles.items():
                parts = values.split(counts)
                tiles[key] = torch.cat([part for part in parts for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, {**kwargs, **tiles}

    @staticmethod
    def _reorder_cache(past_key_values: Any, beam_idx: Tensor) -> Any:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
