"""Parameter groups by path, and the stages of EViP: which groups train when.

A stage splits the parameters once into trainable and frozen. What is frozen is not a variable of the
step: it has no gradient, no optimizer state and no float32 copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mono_jax import tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models.architecture import ModelConfig

Schedule = Literal["constant", "cosine"]

GROUPS: dict[str, str] = {
    "visual_embedding": "patch embedding, its positional embedding, and the projector",
    "visual_encoder": "InternViT's layers (modular models)",
    "visual_experts": "visual FFN experts",
    "visual_attention": "visual attention experts (QKV of visual tokens, Mono-InternVL-1.5)",
    "attention": "wqkv and wo of the language model",
    "text_experts": "FFNs of the language model",
    "norms": "RMSNorms of the language model",
    "token_embeddings": "token embeddings and LM head",
}


def group_table(config: ModelConfig) -> list[tuple[str, str]]:
    """(pattern, group) for every parameter of ``config``'s model; see ``tree.match``."""
    table = [
        (r"layers/(attention_norm|ffn_norm)/.*|final_norm/.*", "norms"),
        (r"layers/attention/.*", "attention"),
        (r"layers/feed_forward/.*", "text_experts"),
        (r"(embed|lm_head)/.*", "token_embeddings"),
    ]
    if config.vision is not None:
        # The class embedding, which no monolithic forward pass reads, belongs here as in the public release:
        # its gradient is zero, so weight decay alone moves it.
        table.append((r"vision/(patch_embedding/.*|(class|position)_embedding)|projector/.*", "visual_embedding"))
        if config.vision.kind == "intern_vit":
            table.append((r"vision/layers/.*", "visual_encoder"))
    if config.visual_ffn_experts:
        table.append((r"layers/visual_feed_forward/.*", "visual_experts"))
    if config.visual_attention_experts:
        table.append((r"layers/visual_attention/.*", "visual_attention"))
    return table


def groups_of(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, str]:
    """{path: group} of every parameter; raises ConfigError if a path has no group or more than one."""
    return tree.match(group_table(config), tree.flatten(params), "parameter groups")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
      name, title: as in the papers.
      trains: groups that train; ("*",) = all.
      learning_rate: peak; a default that the run's config may change.
      schedule: after the warm-up.
      warmup: fraction of the steps.
      weight_decay: of AdamW, on kernels and embeddings.
      loss_weighting: of the data: weight of each trained token ("token": 1, "sqrt": 1 / sqrt of the
        trained tokens of its sample, "sample": 1 / their number).
      source: where the numbers come from.
    """

    name: str
    title: str
    trains: tuple[str, ...]
    learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    source: str
    loss_weighting: Literal["token", "sqrt", "sample"] = "token"


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
        _stage("delta", "ablation: delta tuning (visual parameters alone)", _VISUAL, 2e-4, "constant", _ABLATION),
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
    """The stage ``name``; raises ConfigError that names the nearest one."""
    if name not in STAGES:
        raise unknown_key("stage", name, STAGES)
    return STAGES[name]


def trained_groups(stage: Stage, config: ModelConfig) -> frozenset[str]:
    """Groups of ``config``'s model that ``stage`` trains; raises ConfigError if the model lacks one."""
    present = {group for _, group in group_table(config)}
    if stage.trains == ("*",):
        return frozenset(present)
    if missing := set(stage.trains) - present:
        raise ConfigError(
            f"stage {stage.name} trains {sorted(missing)}, which this model does not have: "
            "choose a model with visual experts, or another stage ('full' trains any model)"
        )
    return frozenset(stage.trains)


def split(stage: Stage, config: ModelConfig, params: Mapping[str, Any]) -> tuple[tree.Tree, tree.Tree]:
    """(trainable, frozen): two nested dicts that share no leaf and together hold every parameter."""
    groups = groups_of(config, params)
    trained = trained_groups(stage, config)
    flat = tree.flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if groups[path] in trained}
    frozen = {path: leaf for path, leaf in flat.items() if groups[path] not in trained}
    return tree.unflatten(trainable), tree.unflatten(frozen)
