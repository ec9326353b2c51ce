"""The stages of EViP: which parameter groups train in which stage, and at which learning rate.

What trains is written as GROUP or GROUP/NAME, optionally with a range of layers at the end: GROUP[0:12] or
GROUP/NAME[0:12];
NAME is a part of the group's paths. ``["attention"]`` trains only wqkv and wo, ``["text_experts/gate",
"text_experts/up"]`` those two matrices of each text expert, ``["visual_experts[12:24]"]`` the visual experts of the
upper half; ``["*"]`` everything.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mono_jax.errors import unknown_key

Schedule = Literal["constant", "cosine", "linear", "wsd"]

GROUPS: dict[str, str] = {
    "visual_embedding": "patch embedding, its positional embedding, and the projector",
    "visual_encoder": "InternViT's layers (modular models)",
    "visual_experts": "visual FFN experts",
    "visual_attention": "visual attention experts (QKV of visual tokens, Mono-InternVL-1.5)",
    "attention": "wqkv and wo of the language model",
    "text_experts": "FFNs of the language model",
    "norms": "RMSNorms of the language model",
    "token_embeddings": "token embeddings and LM head",
    "lora": "low-rank adapters for kernels of decoder layers that stay frozen (training.lora)",
}
LORA = "lora"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
      name, title: as in the papers.
      trains: what trains, in the notation above.
      learning_rate: peak learning rate; a default that the run's config may change.
      schedule: after the warm-up; see ``optim_config.OptimConfig``.
      warmup: fraction of the steps.
      weight_decay: of AdamW, on kernels and embeddings.
      source: where the values come from.
    """

    name: str
    title: str
    trains: tuple[str, ...]
    learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    source: str


_VISUAL = ("visual_embedding", "visual_experts")
_VISUAL_PLUS = (*_VISUAL, "visual_attention")
_OURS = "groups: Mono-InternVL, section 3.3; learning rate and schedule: defaults of this project"
_PLUS = "groups: Mono-InternVL-1.5 (EViP++); learning rate and schedule: defaults of this project"
_ABLATION = "Mono-InternVL, table 5; learning rate as S1.1"


def _stage(name: str, title: str, trains: tuple[str, ...], rate: float, schedule: Schedule, source: str) -> Stage:
    return Stage(name, title, trains, rate, schedule, 0.03, 0.01, source)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage("S0", "text only: pre-trains a base language model", ("*",), 3e-4, "cosine", "this project's demo"),
        _stage("S1.1", "concept learning", _VISUAL, 2e-4, "constant", _OURS),
        _stage("S1.2", "semantic learning", _VISUAL, 1e-4, "constant", _OURS),
        _stage("S1.3", "alignment learning", (*_VISUAL, "attention"), 5e-5, "cosine", _OURS),
        _stage("S2", "instruction tuning", ("*",), 4e-5, "cosine", "public release, LLaVA-665k recipe"),
        _stage("S1.1++", "concept learning, EViP++", _VISUAL_PLUS, 2e-4, "constant", _PLUS),
        _stage("S1.2++", "semantic learning, EViP++", _VISUAL_PLUS, 1e-4, "constant", _PLUS),
        _stage("S1.3++", "alignment learning, EViP++", (*_VISUAL_PLUS, "attention"), 5e-5, "cosine", _PLUS),
        _stage("S2++", "instruction tuning, EViP++", ("*",), 4e-5, "cosine", _PLUS),
        _stage("delta", "ablation: delta tuning (visual parameters only)", _VISUAL, 2e-4, "constant", _ABLATION),
        _stage("full", "ablation: full tuning, with or without visual experts", ("*",), 2e-4, "constant", _ABLATION),
        _stage(
            "S1.3-frozen-attention",
            "ablation: alignment with attention frozen (table 9)",
            _VISUAL,
            5e-5,
            "cosine",
            "Mono-InternVL, table 9; learning rate as S1.3",
        ),
    )
}


def get_stage(name: str) -> Stage:
    """The stage ``name``; raises ConfigError that names the closest one."""
    if name not in STAGES:
        raise unknown_key("stage", name, STAGES)
    return STAGES[name]
