"""The exported model in vLLM: the exported code with vLLM's paged attention in place of its own.

As in the exported model, each expert computes only its own tokens. Runs eagerly on one device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY

from mono_jax_vllm.images import PLACEHOLDER, DummyInputs, Info, Processor


def refused(vllm_config: VllmConfig) -> str | None:
    """Why this model or configuration is not served; None if it is."""
    a = vllm_config.model_config.hf_config.architecture
    if a["vision"] is None:
        return "a language model: export it with --layout=published, which vLLM runs without this plugin"
    if a["bidirectional_images"]:
        return "bidirectional_images: only causal attention is supported"
    if (a["rope_scaling"] or {}).get("type") == "dynamic":
        return "rope_scaling 'dynamic': the angles of cached keys would change with the length"
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        return "tensor_parallel_size: only one device is supported"
    if vllm_config.lora_config is not None:
        return "enable_lora: adapters are merged before the export"
    if not vllm_config.model_config.enforce_eager:
        return "pass --enforce-eager: each step depends on which tokens are visual"
    return None


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class MonoJaxForVLLM(nn.Module, SupportsMultiModal):
    requires_raw_input_tokens = True  # the id tells whether a token is visual

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        if (reason := refused(vllm_config)) is not None:
            raise ValueError(f"mono_jax_vllm does not serve this: {reason}")
        config, folder = vllm_config.model_config.hf_config, vllm_config.model_config.model
        code = get_class_from_dynamic_module("modeling_mono_jax.MonoJaxForCausalLM", folder)
        self.code = sys.modules[code.__module__]
        self.model = code(config)
        self.a = a = self.model.a
        for number, layer in enumerate(self.model._language.model.layers):
            attention = layer.part("attention")
            paged = Attention(
                a.num_attention_heads,
                a.head_dim,
                attention.scale,
                num_kv_heads=a.num_key_value_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=a.sliding_window if number in a.sliding_layers else None,
                prefix=f"{prefix}.layers.{number}.attention".lstrip("."),
            )
            attention.paged, attention.mix = paged, functools.partial(_mix, paged)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACEHOLDER

    def get_language_model(self) -> nn.Module:
        return self

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """Visual tokens [tokens, d] of each image."""
        if kwargs.get("pixel_values") is None:
            return ()
        found = self.model.embed_images(kwargs["pixel_values"], kwargs.get("pixel_cells"))  # [tiles, tokens, d]
        return tuple(image.flatten(0, 1) for image in found.split(kwargs["image_sizes"].flatten().tolist()))

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        x = self.model.embed_text(input_ids)
        if not multimodal_embeddings:
            return x
        return _merge_multimodal_embeddings(x, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Normalised hidden states [N, d] of the tokens of all requests."""
        a, code = self.a, self.code
        x = (self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds)[None]
        visual, places = input_ids == a.image_token_id, code.Places()
        if bool(visual.any()):
            places = code.Places((~visual).nonzero()[:, 0], visual.nonzero()[:, 0])
        seen = {}
        for sliding in {number in a.sliding_layers for number in range(a.num_hidden_layers)}:
            cosines, sines = code.rotary(a, positions[None], None, sliding)
            seen[sliding] = code.Seen(None, cosines[:, :, None], sines[:, :, None])
        for number, layer in enumerate(self.model._language.model.layers):
            x = layer(x, seen[number in a.sliding_layers], places, None)
        return self.model._language.model.norm(x)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """A placeholder is never an answer."""
        logits = self.model.logits(hidden_states)
        logits[:, self.a.image_token_id] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Checkpoints use the exported code's names. Raises KeyError for a tensor that the model does not have."""
        own = dict(self.model.named_parameters())
        loaded = set()
        with torch.no_grad():
            for name, values in weights:
                own[name].copy_(values)
                loaded.add(f"model.{name}")
        return loaded


def _mix(paged: Attention, query: Tensor, key: Tensor, value: Tensor, *unused: Any) -> Tensor:
    """[1, N, Hq, D] from queries [1, N, Hq, D]; keys and values [1, N, Hkv, D] are written to the cache."""
    mixed = paged(*(part[0].flatten(1).contiguous() for part in (query, key, value)))
    return mixed.view_as(query)
