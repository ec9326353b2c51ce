"""Parameter groups by path, and which parts of them a stage trains.

A stage splits the parameters once into trainable and frozen. Frozen parameters are not variables of the step: they have
no gradient, no optimizer state and no float32 copy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mono_jax import tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models import layer_ranges
from mono_jax.models.adapters import is_adapter
from mono_jax.models.architecture import Architecture
from mono_jax.training.stages import GROUPS, LORA, Stage


def group_table(config: Architecture) -> list[tuple[str, str]]:
    """(pattern, group) for every parameter of ``config``'s model; see ``tree.match``."""
    table = [
        (r"layers/(attention|ffn)(_post)?_norm/.*|final_norm/.*", "norms"),
        (r"layers/attention/.*", "attention"),
        (r"layers/feed_forward/.*", "text_experts"),
        (r"(embed|lm_head)/.*", "token_embeddings"),
    ]
    if config.vision is not None:
        # The class embedding, which no monolithic forward pass reads, belongs here as in the public release; its
        # gradient is zero, so only weight decay changes it.
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
    paths = tree.flatten(params)
    own = [path for path in paths if not is_adapter(path)]
    return tree.match(group_table(config), own, "parameter groups") | dict.fromkeys(filter(is_adapter, paths), LORA)


_SELECTION = re.compile(r"(?P<group>\w+)(?:/(?P<name>\w+))?(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclasses.dataclass(frozen=True)
class Selection:
    """One entry of ``Stage.trains``: a group, a part of its paths ("" = all), a range of layers (None = all)."""

    group: str
    name: str = ""
    layers: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str, layers: int | None, where: str = "trains") -> Selection:
        """Raises ConfigError, about the key ``where``, for an unknown group or a range outside ``layers`` layers.

        ``layers``: None = not known yet, so that any range of layers is accepted that is not empty.
        """
        found = _SELECTION.fullmatch(text)
        if found is None:
            raise ConfigError(f"{where}: {text!r} is not of the form GROUP, GROUP/NAME, GROUP[a:b] or GROUP/NAME[a:b]")
        if found["group"] not in GROUPS:
            raise unknown_key(f"parameter group in {where}", found["group"], GROUPS)
        if found["group"] == LORA and text != LORA:
            raise ConfigError(f"trains: {text!r}: lora.targets selects the kernels with adapters; write {LORA!r}")
        if found["start"] is None:
            return cls(found["group"], found["name"] or "")
        start = int(found["start"] or 0)
        stop = int(found["stop"] or layers or start + 1)
        if start >= stop or stop > (layers or stop):
            known = "the range is empty" if layers is None else f"the model has layers 0 to {layers - 1}"
            raise ConfigError(f"{where}: {text!r}: {known}")
        return cls(found["group"], found["name"] or "", (start, stop))

    def takes(self, path: str, group: str) -> bool:
        """Whether the parameter at ``path`` of ``group`` belongs to the selection, ignoring its range of layers."""
        return group == self.group and (not self.name or self.name in path.split("/"))


def selections(stage: Stage, config: Architecture) -> list[Selection]:
    """The parts of ``config``'s model that ``stage`` trains; raises ConfigError if the model lacks a group."""
    present = {group for _, group in group_table(config)} | {LORA} & {*stage.trains}
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

    ``params``: arrays, or their shapes. Parameters with only a range of layers trained are split into pieces; see
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
    # Adapters are not part of the parameters that a run starts from.
    if unused := [selection for selection in chosen if selection not in used and selection.group != LORA]:
        raise ConfigError(f"trains: group {unused[0].group} has no parameter named {unused[0].name!r}")
    return tree.unflatten(trainable), tree.unflatten(frozen)


def _pieces(path: str, leaf: Any, hits: list[Selection]) -> list[tuple[str, Any, bool]]:
    """(path, array, trains) of the whole ``leaf``, or of its ranges of layers."""
    if not hits or any(hit.layers is None for hit in hits):
        return [(path, leaf, bool(hits))]
    if len(hits) > 1:
        raise ConfigError(f"trains: {path} is selected by several ranges of layers: give one range")
    if not path.startswith("layers/"):
        raise ConfigError(f"trains: {path} has no layers to choose from: leave out the range")
    return layer_ranges.cut(path, leaf, *hits[0].layers)
