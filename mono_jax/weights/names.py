"""Which tensor of a Hugging Face checkpoint is which parameter, and its layout there.

The language model's names are those of its family (``families``), under ``language_model.`` in a multimodal model; the
others are those of the public releases of InternVL and Mono-InternVL. Published names for visual experts exist only
for InternLM2's FFNs; the others here are this project's own and can be changed with a name table (JSON:
``{"parameter/path": "checkpoint.name.{n}.weight"}``).
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
from mono_jax.weights import qkv
from mono_jax.weights.families.table import family_of

Names = Mapping[str, str]  # parameter path -> name of its tensor, with {n} for the layer

DTYPES = {  # of safetensors files, by the name there
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

_LM = "language_model."
_VIT = "vision_model.encoder.layers.{n}."
_EMBEDDINGS = "vision_model.embeddings."

# Path of a parameter of the visual side -> name of its tensor in the checkpoint ({n} = layer).
VISION: dict[str, str] = {
    "vision/class_embedding": _EMBEDDINGS + "class_embedding",
    "vision/position_embedding": _EMBEDDINGS + "position_embedding",
    "vision/patch_embedding/kernel": _EMBEDDINGS + "patch_embedding.weight",
    "vision/patch_embedding/bias": _EMBEDDINGS + "patch_embedding.bias",
    "vision/layers/norm1/scale": _VIT + "norm1.weight",
    "vision/layers/norm1/bias": _VIT + "norm1.bias",
    "vision/layers/norm2/scale": _VIT + "norm2.weight",
    "vision/layers/norm2/bias": _VIT + "norm2.bias",
    "vision/layers/attn/qkv/kernel": _VIT + "attn.qkv.weight",
    "vision/layers/attn/qkv/bias": _VIT + "attn.qkv.bias",
    "vision/layers/attn/proj/kernel": _VIT + "attn.proj.weight",
    "vision/layers/attn/proj/bias": _VIT + "attn.proj.bias",
    "vision/layers/attn/q_norm/scale": _VIT + "attn.q_norm.weight",
    "vision/layers/attn/k_norm/scale": _VIT + "attn.k_norm.weight",
    "vision/layers/mlp/fc1/kernel": _VIT + "mlp.fc1.weight",
    "vision/layers/mlp/fc1/bias": _VIT + "mlp.fc1.bias",
    "vision/layers/mlp/fc2/kernel": _VIT + "mlp.fc2.weight",
    "vision/layers/mlp/fc2/bias": _VIT + "mlp.fc2.bias",
    "vision/layers/ls1/scale": _VIT + "ls1",
    "vision/layers/ls2/scale": _VIT + "ls2",
    "projector/norm/scale": "mlp1.0.weight",
    "projector/norm/bias": "mlp1.0.bias",
    "projector/fc1/kernel": "mlp1.1.weight",
    "projector/fc1/bias": "mlp1.1.bias",
    "projector/fc2/kernel": "mlp1.3.weight",
    "projector/fc2/bias": "mlp1.3.bias",
}


# Layouts in the checkpoint:
#   same    unchanged
#   kernel  [out, in], ours [in, out]
#   conv    [C, 3, P, P], ours [P*P*3, C] with rows ordered (row, column, channel)
#   batch   leading axes of size 1 until the tensor has three axes
def _layout(path: str) -> str:
    if path.startswith("vision/patch_embedding/"):
        return "conv" if path.endswith("kernel") else "same"
    if path in ("vision/class_embedding", "vision/position_embedding"):
        return "batch"
    return "kernel" if path.endswith("/kernel") else "same"


def patterns(config: Architecture, names: Names | None = None) -> dict[str, str]:
    """Path of a parameter -> name of its tensor, for all parameters that models of ``config``'s family may have.

    {n} stands for the layer, {qkv} for q, k and v if these are three tensors. Raises ConfigError for bad ``names``.
    """
    prefix = "" if config.vision is None else _LM
    table = {path: prefix + name for path, name in family_of(config).tensors.items()} | VISION
    for path, pattern in (names or {}).items():
        if path not in table:
            raise unknown_key("path in the name table", path, table)
        for part in ("{n}", "{qkv}"):
            count = table[path].count(part)
            if not isinstance(pattern, str) or pattern.count(part) != count:
                raise ConfigError(f"name table: {path}: {pattern!r} must have {'one' if count else 'no'} {part}")
    return table | dict(names or {})


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
      pattern: its name in the checkpoint, with {n} for the layer if stacked, {qkv} if it is three tensors.
      shape: our shape, of one layer if stacked.
      layers: number of stacked layers; None if not stacked.
      heads: the model's heads, by which the three tensors are split.
    """

    path: str
    pattern: str
    layout: str
    shape: tuple[int, ...]
    layers: int | None
    patch_size: int
    heads: qkv.Heads

    def names(self, n: int | None) -> tuple[str, ...]:
        """Names of the tensors of layer ``n``: one, or those of q, k and v."""
        name = self.pattern if n is None else self.pattern.replace("{n}", str(n))
        return tuple(name.replace("{qkv}", part) for part in "qkv") if "{qkv}" in name else (name,)

    @property
    def slices(self) -> tuple[int | None, ...]:
        return (None,) if self.layers is None else tuple(range(self.layers))

    @property
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each of ``names`` in the checkpoint."""
        if "{qkv}" in self.pattern:
            return tuple((rows, *self._hf_shape[1:]) for rows in self.heads.rows)
        return (self._hf_shape,)

    @property
    def _hf_shape(self) -> tuple[int, ...]:
        if self.layout == "kernel":
            return self.shape[::-1]
        if self.layout == "conv":
            rows, out = self.shape
            return (out, rows // self.patch_size**2, self.patch_size, self.patch_size)
        if self.layout == "batch":
            return (1,) * (3 - len(self.shape)) + self.shape
        return self.shape

    def to_ours(self, *arrays: np.ndarray) -> np.ndarray:
        """The tensors ``names`` as [*shape]."""
        array = self.heads.fuse(*arrays) if "{qkv}" in self.pattern else arrays[0]
        if self.layout == "kernel":
            return array.T
        if self.layout == "conv":
            array = array.transpose(2, 3, 1, 0)
        return array.reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """``array`` [*shape] as the tensors ``names``."""
        array = self._to_hf(array)
        return self.heads.split(array) if "{qkv}" in self.pattern else (array,)

    def _to_hf(self, array: np.ndarray) -> np.ndarray:
        if self.layout == "kernel":
            return array.T
        if self.layout == "conv":
            out, channels, *patch = self._hf_shape
            return array.reshape(*patch, channels, out).transpose(3, 2, 0, 1)
        return array.reshape(self._hf_shape)


def tensors(config: Architecture, names: Names | None = None) -> list[Tensor]:
    """The table rows for ``config``, every parameter exactly once; raises ConfigError for bad ``names``."""
    table = patterns(config, names)
    heads = qkv.Heads.of(config)
    rows = []
    for path, shape in param_shapes(config).items():
        if path not in table:
            raise ConfigError(f"{path}: no name in checkpoints of {family_of(config).title} (model.family)")
        stacked = is_stacked(path)
        rows.append(
            Tensor(
                path=path,
                pattern=table[path],
                layout=_layout(path),
                shape=shape[1:] if stacked else shape,
                layers=shape[0] if stacked else None,
                patch_size=config.vision.patch_size if config.vision else 0,
                heads=heads,
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
    """One error that counts everything that does not fit and lists the first of each kind; None if everything fits."""
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


# Names found only in checkpoints of these kinds, and how to make a readable checkpoint from them.
_FAMILIES = (
    (r"^base_model\.model\.|\.lora_[AB]\.", "a PEFT adapter's", "merge it into its base model first"),
    (r"^_orig_mod\.|^module\.", "those of a wrapped PyTorch model (torch.compile, DDP)", "save the inner model"),
    (r"vision_tower\.|multi_modal_projector\.", "those of LLaVA or of transformers' own InternVL", ""),
    (r"^visual\.blocks\.", "Qwen-VL's", ""),
    (r"self_attn\.(q|k|v|qkv)_proj\.", "those of a Llama, Qwen or Phi language model", "see model_type in config.json"),
    (r"^(transformer\.)?h\.\d+\.", "GPT-2's or Qwen 1's", ""),
)
_OTHER_MODEL = "this project reads language models, InternVL-Chat and Mono-InternVL (see --names of convert.py)"


def foreign_names(names: Iterable[str]) -> str | None:
    """What the tensor ``names`` look like, and the fix, if they are those of a checkpoint of another family."""
    listed = list(names)
    for pattern, family, fix in _FAMILIES:
        if hits := [name for name in listed if re.search(pattern, name)]:
            return f"the names of its tensors are {family} ({first(hits, 2)}): {fix or _OTHER_MODEL}"
    return None
