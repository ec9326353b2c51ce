"""Images of a prompt, processed as by the exported processor.

A prompt has ``PLACEHOLDER`` in the place of an image. The images of one prompt share the maximum number of tiles, so
the tiles of an image depend on the number of images, which is therefore part of the cache key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

CONTEXT = "<IMG_CONTEXT>"
PLACEHOLDER = f"<img>{CONTEXT}</img>"  # CONTEXT is then repeated for each visual token of the image


class Info(BaseProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """Images with the maximum number of visual tokens."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACEHOLDER * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        processor, count = self.info.get_hf_processor(), mm_counts.get("image", 0)
        tiles = max(1, processor.max_tiles // max(1, count))
        size = {"width": tiles * processor.tile_size, "height": processor.tile_size}
        return {"image": self._get_dummy_images(**size, num_images=count, overrides=mm_options.get("image"))}


class Processor(BaseMultiModalProcessor[Info]):
    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor, images = self.info.get_hf_processor(), hf_data["images"]
        cut = [(processor.native_tokens if processor.native else processor.tiles)(each, len(images)) for each in images]
        made = {"pixel_values": np.concatenate([pixels for pixels, _ in cut])}
        made["image_sizes"] = np.array([len(pixels) for pixels, _ in cut])
        if processor.native:
            made["pixel_cells"] = np.concatenate([cells for _, cells in cut])
        return BatchFeature(made, tensor_type="pt")

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        return self._apply_hf_processor(inputs, timing_ctx)  # all images together: cached ones count too

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)
        return {kind: [f"{each}-{len(items)}" for each in items] for kind, items in hashes.items()}

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        sizes = hf_inputs.get("image_sizes", torch.empty(0, dtype=torch.long))
        parts = [name for name in ("pixel_values", "pixel_cells") if name in hf_inputs]
        fields = {name: MultiModalFieldConfig.flat_from_sizes("image", sizes) for name in parts}
        return fields | {"image_sizes": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        processor, context = self.info.get_hf_processor(), self.info.get_hf_config().image_token_id
        each = 1 if processor.native else (processor.tile_size // processor.token_pixels) ** 2

        def replacement(number: int) -> list[int]:
            return [context] * (each * int(out_mm_kwargs["image"][number]["image_sizes"].data))

        return [PromptReplacement(modality="image", target=[context], replacement=replacement)]
