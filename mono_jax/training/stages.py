"""Parameter groups by path, and the stages of EViP: which groups train when.

A stage splits the parameters once into trainable and frozen. What is frozen is not a variable of the
step: it has no gradient, no optimizer state and no float32 copy.

What trains is written as GROUP, GROUP/NAME or with a range of layers at the end, GROUP[0:12] or GROUP/NAME[0:12];
NAME is a part of the group's paths. ``["attention"]`` trains wqkv and wo only, ``["text_experts/gate",
"text_experts/up"]`` those two matrices of each text expert, ``["visual_experts[12:24]"]`` the visual experts of the
upper half; ``["*"]`` everything.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from mono_jax import tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models import layer_ranges
from mono_jax.models.architecture import Architecture

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
}


def group_table(config: Architecture) -> list[tuple[str, str]]:
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


def groups_of(config: Architecture, params: Mapping[str, Any]) -> dict[str, str]:
    """{path: group} of every parameter; raises ConfigError if a path has no group or more than one."""
    return tree.match(group_table(config), tree.flatten(params), "parameter groups")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
      name, title: as in the papers.
      trains: what trains, in the words above.
      learning_rate: peak; a default that the run's config may change.
      schedule: after the warm-up; see ``optim_config.OptimConfig``.
      warmup: fraction of the steps.
      weight_decay: of AdamW, on kernels and embeddings.
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
    """The stage ``name``; raises ConfigError that names the nearest one."""
    if name not in STAGES:
        raise unknown_key("stage", name, STAGES)
    return STAGES[name]


_SELECTION = re.compile(r"(?P<group>\w+)(?:/(?P<name>\w+))?(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclasses.dataclass(frozen=True)
class Selection:
    """One entry of ``Stage.trains``: a group, a part of its paths ("" = all), a range of layers (None = all)."""

    group: str
    name: str = ""
    layers: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str, layers: int) -> Selection:
        """Raises ConfigError for an unknown group, or a range outside a model of ``layers`` layers."""
        found = _SELECTION.fullmatch(text)
        if found is None:
            raise ConfigError(f"trains: {text!r} is not of the form GROUP, GROUP/NAME, GROUP[a:b] or GROUP/NAME[a:b]")
        if found["group"] not in GROUPS:
            raise unknown_key("parameter group", found["group"], GROUPS)
        if found["start"] is None:
            return cls(found["group"], found["name"] or "")
        start, stop = int(found["start"] or 0), int(found["stop"] or layers)
        if not 0 <= start < stop <= layers:
            raise ConfigError(f"trains: {text!r}: the model has the layers 0 to {layers - 1}")
        return cls(found["group"], found["name"] or "", (start, stop))

    def takes(self, path: str, group: str) -> bool:
        """Whether the parameter at ``path`` of ``group`` belongs to the selection, its range of layers aside."""
        return group == self.group and (not self.name or self.name in path.split("/"))


def selections(stage: Stage, config: Architecture) -> list[Selection]:
    """What ``stage`` trains of ``config``'s model; raises ConfigError if the model lacks a group."""
    present = {group for _, group in group_table(config)}
    if "*" in stage.trains:
        return [Selection(group) for group in sorted(present)]
    found = [Selection.parse(text, config.num_hidden_layers) for text in stage.trains]
    if missing := {selection.group for selection in found} - present:
        raise ConfigError(
            f"stage {stage.name} trains {sorted(missing)}, which this model does not have: "
            "choose a model with visual experts, or another stage ('full' trains any model)"
        )
    return found


def trained_groups(stage: Stage, config: Architecture) -> frozenset[str]:
    """Groups of ``config``'s model that ``stage`` trains, wholly or in part; raises ConfigError if the model lacks
    one.
    """
    return frozenset(selection.group for selection in selections(stage, config))


def split(stage: Stage, config: Architecture, params: Mapping[str, Any]) -> tuple[tree.Tree, tree.Tree]:
    """(trainable, frozen): two nested dicts that share no leaf and together hold every parameter.

    ``params``: arrays, or their shapes. Parameters of which only a range of layers trains are cut into pieces; see
    ``models.layer_ranges``. Raises ConfigError for a selection that matches no parameter.
    """
    groups, chosen = groups_of(config, params), selections(stage, config)
    trainable: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    used: set[Selection] = set()
    for path, leaf in tree.flatten(params).items():
        hits = [selection for selection in chosen if selection.takes(path, groups[path])]
        used |= set(hits)
        for piece, array, trains in _pieces(path, leaf, hits):
            (trainable if trains else frozen)[piece] = array
    if unused := [selection for selection in chosen if selection not in used]:
        raise ConfigError(f"trains: group {unused[0].group} has no parameter named {unused[0].name!r}")
    return tree.unflatten(trainable), tree.unflatten(frozen)


def _pieces(path: str, leaf: Any, hits: list[Selection]) -> list[tuple[str, Any, bool]]:
    """(path, array, trains) of the whole ``leaf``, or of its ranges of layers."""
    if not hits or any(hit.layers is None for hit in hits):
        return [(path, leaf, bool(hits))]
    if len(hits) > 1:
        raise ConfigError(f"trains: {path} is selected by several ranges of layers: give one range")
    if not path.startswith("layers/"):
        raise ConfigError(f"trains: {path} has no layers to choose from: leave the range out")
    return layer_ranges.cut(path, leaf, *hits[0].layers)
