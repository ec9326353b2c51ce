"""Which tensor of a Hugging Face checkpoint is which parameter, and how it is laid out there.

The names are those of the public release of Mono-InternVL (InternLM2's under ``language_model.``). For the visual
attention experts of Mono-InternVL-1.5 no published names are known; those here are this project's own and can be
changed with a name table (JSON: ``{"parameter/path": "checkpoint.name.{n}.weight"}``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError, unknown_key
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model

Names = Mapping[str, str]  # parameter path -> name of its tensor, {n} for the layer

DTYPES = {  # of safetensors files, by the name there
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

_LM = "language_model."
_LAYER = _LM + "model.layers.{n}."
_VIT = "vision_model.encoder.layers.{n}."
_EMBEDDINGS = "vision_model.embeddings."

# Path of the parameter -> name of its tensor in the checkpoint ({n} = layer), and layout there:
#   same    as it is
#   kernel  [out, in], ours [in, out]
#   conv    [C, 3, P, P], ours [P*P*3, C] with rows ordered (row, column, channel)
#   batch   leading axes of size 1 until the tensor has three
TABLE: dict[str, tuple[str, str]] = {
    "embed/embedding": (_LM + "model.tok_embeddings.weight", "same"),
    "final_norm/scale": (_LM + "model.norm.weight", "same"),
    "lm_head/kernel": (_LM + "output.weight", "kernel"),
    "layers/attention_norm/scale": (_LAYER + "attention_norm.weight", "same"),
    "layers/ffn_norm/scale": (_LAYER + "ffn_norm.weight", "same"),
    "layers/attention/wqkv/kernel": (_LAYER + "attention.wqkv.weight", "kernel"),
    "layers/attention/wqkv/bias": (_LAYER + "attention.wqkv.bias", "same"),
    "layers/attention/wo/kernel": (_LAYER + "attention.wo.weight", "kernel"),
    "layers/attention/wo/bias": (_LAYER + "attention.wo.bias", "same"),
    "layers/visual_attention/wqkv/kernel": (_LAYER + "attention.wqkv_ve.weight", "kernel"),
    "layers/visual_attention/wqkv/bias": (_LAYER + "attention.wqkv_ve.bias", "same"),
    "layers/feed_forward/gate/kernel": (_LAYER + "feed_forward.w1.weight", "kernel"),
    "layers/feed_forward/up/kernel": (_LAYER + "feed_forward.w3.weight", "kernel"),
    "layers/feed_forward/down/kernel": (_LAYER + "feed_forward.w2.weight", "kernel"),
    "layers/visual_feed_forward/gate/kernel": (_LAYER + "feed_forward_ve.w1.weight", "kernel"),
    "layers/visual_feed_forward/up/kernel": (_LAYER + "feed_forward_ve.w3.weight", "kernel"),
    "layers/visual_feed_forward/down/kernel": (_LAYER + "feed_forward_ve.w2.weight", "kernel"),
    "vision/class_embedding": (_EMBEDDINGS + "class_embedding", "batch"),
    "vision/position_embedding": (_EMBEDDINGS + "position_embedding", "batch"),
    "vision/patch_embedding/kernel": (_EMBEDDINGS + "patch_embedding.weight", "conv"),
    "vision/patch_embedding/bias": (_EMBEDDINGS + "patch_embedding.bias", "same"),
    "vision/layers/norm1/scale": (_VIT + "norm1.weight", "same"),
    "vision/layers/norm1/bias": (_VIT + "norm1.bias", "same"),
    "vision/layers/norm2/scale": (_VIT + "norm2.weight", "same"),
    "vision/layers/norm2/bias": (_VIT + "norm2.bias", "same"),
    "vision/layers/attn/qkv/kernel": (_VIT + "attn.qkv.weight", "kernel"),
    "vision/layers/attn/qkv/bias": (_VIT + "attn.qkv.bias", "same"),
    "vision/layers/attn/proj/kernel": (_VIT + "attn.proj.weight", "kernel"),
    "vision/layers/attn/proj/bias": (_VIT + "attn.proj.bias", "same"),
    "vision/layers/attn/q_norm/scale": (_VIT + "attn.q_norm.weight", "same"),
    "vision/layers/attn/k_norm/scale": (_VIT + "attn.k_norm.weight", "same"),
    "vision/layers/mlp/fc1/kernel": (_VIT + "mlp.fc1.weight", "kernel"),
    "vision/layers/mlp/fc1/bias": (_VIT + "mlp.fc1.bias", "same"),
    "vision/layers/mlp/fc2/kernel": (_VIT + "mlp.fc2.weight", "kernel"),
    "vision/layers/mlp/fc2/bias": (_VIT + "mlp.fc2.bias", "same"),
    "vision/layers/ls1/scale": (_VIT + "ls1", "same"),
    "vision/layers/ls2/scale": (_VIT + "ls2", "same"),
    "projector/norm/scale": ("mlp1.0.weight", "same"),
    "projector/norm/bias": ("mlp1.0.bias", "same"),
    "projector/fc1/kernel": ("mlp1.1.weight", "kernel"),
    "projector/fc1/bias": ("mlp1.1.bias", "same"),
    "projector/fc2/kernel": ("mlp1.3.weight", "kernel"),
    "projector/fc2/bias": ("mlp1.3.bias", "same"),
}


@functools.lru_cache(maxsize=16)
def param_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of ``config`` by path; stacked layers have a leading axis."""
    return {path: leaf.shape for path, leaf in tree.flatten(Model(config).abstract_params()).items()}


def is_stacked(path: str) -> bool:
    """Whether the parameter at ``path`` has a leading axis of layers."""
    return path.startswith(("layers/", "vision/layers/"))


@dataclass(frozen=True)
class Tensor:
    """One row of the table for one config.

    Attributes:
      pattern: its name in the checkpoint, with {n} for the layer where stacked.
      shape: ours, of one layer where stacked.
      layers: how many are stacked; None for a parameter that is not.
    """

    path: str
    pattern: str
    layout: str
    shape: tuple[int, ...]
    layers: int | None
    patch_size: int

    def name(self, n: int | None) -> str:
        """Name of the tensor of layer ``n``."""
        return self.pattern if n is None else self.pattern.replace("{n}", str(n))

    @property
    def slices(self) -> tuple[int | None, ...]:
        return (None,) if self.layers is None else tuple(range(self.layers))

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        if self.layout == "kernel":
            return self.shape[::-1]
        if self.layout == "conv":
            rows, out = self.shape
            return (out, rows // self.patch_size**2, self.patch_size, self.patch_size)
        if self.layout == "batch":
            return (1,) * (3 - len(self.shape)) + self.shape
        return self.shape

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """``array`` [*hf_shape] as [*shape]."""
        if self.layout == "kernel":
            return array.T
        if self.layout == "conv":
            array = array.transpose(2, 3, 1, 0)
        return array.reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """``array`` [*shape] as [*hf_shape]."""
        if self.layout == "kernel":
            return array.T
        if self.layout == "conv":
            out, channels, *patch = self.hf_shape
            return array.reshape(*patch, channels, out).transpose(3, 2, 0, 1)
        return array.reshape(self.hf_shape)


def tensors(config: Architecture, names: Names | None = None) -> list[Tensor]:
    """The rows of the table that ``config`` has, every parameter exactly once; raises ConfigError for bad ``names``."""
    for path, pattern in (names or {}).items():
        if path not in TABLE:
            raise unknown_key("path in the name table", path, TABLE)
        if not isinstance(pattern, str) or pattern.count("{n}") != is_stacked(path):
            raise ConfigError(f"name table: {path}: {pattern!r} must have {'one' if is_stacked(path) else 'no'} {{n}}")
    rows = []
    for path, shape in param_shapes(config).items():
        pattern, layout = TABLE[path]
        if config.vision is None:
            pattern = pattern.removeprefix(_LM)
        stacked = is_stacked(path)
        rows.append(
            Tensor(
                path=path,
                pattern=(names or {}).get(path, pattern),
                layout=layout,
                shape=shape[1:] if stacked else shape,
                layers=shape[0] if stacked else None,
                patch_size=config.vision.patch_size if config.vision else 0,
            )
        )
    seen: dict[str, str] = {}
    for row in rows:
        if seen.setdefault(row.pattern, row.path) != row.path:
            raise ConfigError(f"name table: {row.path} and {seen[row.pattern]} both have the name {row.pattern!r}")
    return rows


def check_params(config: Architecture, flat: Mapping[str, Any]) -> None:
    """Raises WeightsError listing every parameter that is missing, unexpected or misshapen for ``config``."""
    shapes = param_shapes(config)
    missing = [path for path in shapes if path not in flat]
    unexpected = [path for path in flat if path not in shapes]
    misshapen = [
        f"{path} is {list(flat[path].shape)}, the config asks for {list(shape)}"
        for path, shape in shapes.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    misshapen += [
        f"{path} is {leaf.dtype}, use one of {', '.join(map(str, DTYPES.values()))}"
        for path, leaf in flat.items()
        if np.dtype(leaf.dtype) not in DTYPES.values()
    ]
    if error := fit_error("parameters do not fit the config", missing, unexpected, misshapen):
        raise error


def fit_error(what: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> WeightsError | None:
    """The one error that counts all that does not fit and lists the first of each kind; None where everything does."""
    problems = [
        f"{len(items)} {kind} ({first(items)})"
        for kind, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if items
    ]
    return WeightsError(f"{what}: {'; '.join(problems)}") if problems else None


def first(items: Sequence[str], count: int = 5, separator: str = ", ") -> str:
    """The first ``count`` of ``items``, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return separator.join(items[:count]) + more


# Names that only checkpoints of these kinds have, and what makes one that can be read of them.
_FAMILIES = (
    (r"^base_model\.model\.|\.lora_[AB]\.", "a PEFT adapter's", "merge it into its base model first"),
    (r"^_orig_mod\.|^module\.", "those of a wrapped PyTorch model (torch.compile, DDP)", "save the inner model"),
    (r"vision_tower\.|multi_modal_projector\.", "those of LLaVA or of transformers' own InternVL", ""),
    (r"^visual\.blocks\.", "Qwen-VL's", ""),
    (r"self_attn\.(q|k|v|qkv)_proj\.", "those of a Llama, Qwen or Phi language model", ""),
    (r"^(transformer\.)?h\.\d+\.", "GPT-2's or Qwen 1's", ""),
)
_OTHER_MODEL = "this project reads InternLM2, InternVL-Chat on InternLM2, and Mono-InternVL (see --names of convert.py)"


def foreign_names(names: Iterable[str]) -> str | None:
    """What the tensor ``names`` look like, and the fix, if they are those of a checkpoint of another family."""
    listed = list(names)
    for pattern, family, fix in _FAMILIES:
        if hits := [name for name in listed if re.search(pattern, name)]:
            return f"the names of its tensors are {family} ({first(hits, 2)}): {fix or _OTHER_MODEL}"
    return None
