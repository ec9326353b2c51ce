"""Which kernels have low-rank adapters, and their size."""

from __future__ import annotations

import dataclasses

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models.adapters import Adapters
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.training.groups import Selection, groups_of, selections
from mono_jax.training.stages import LORA, Stage

ADAPTABLE = ("attention", "text_experts", "visual_attention", "visual_experts")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, if `trains` names "lora"."""

    rank: int = field(16, ge=1, help="r; the adapter of a kernel [in, out] has r * (in + out) parameters")
    alpha: float = field(32.0, gt=0, help="the adapter's output is scaled by alpha / rank")
    targets: tuple[str, ...] | None = field(
        None,
        help="kernels that get adapters, as GROUP or GROUP/NAME, from attention, text_experts, visual_attention and "
        "visual_experts; None = all of these that the model has and that `trains` leaves frozen",
    )

    def __post_init__(self) -> None:
        strict.check(self, "lora", ConfigError)
        if self.targets is not None and not self.targets:
            raise ConfigError("lora.targets is empty: name at least one group, or leave out the key")


def adapters_of(lora: LoraConfig, stage: Stage, config: Architecture) -> Adapters | None:
    """The adapters of ``config``'s model that ``stage`` trains; None if it trains none.

    Raises ConfigError for a target that the model lacks, that cannot have adapters, or that is itself trained.
    """
    training = selections(stage, config)
    if all(selection.group != LORA for selection in training):
        return None
    groups = groups_of(config, Model(config).abstract_params())
    kernels = {path: group for path, group in groups.items() if group in ADAPTABLE and path.endswith("/kernel")}
    trained = {path for path, group in kernels.items() if any(s.takes(path, group) for s in training)}
    if lora.targets is None:
        chosen = kernels.keys() - trained
    else:
        chosen = set().union(*(_named(text, kernels, config) for text in lora.targets))
    if own := sorted(chosen & trained):
        raise ConfigError(f"lora.targets: {own[0]} is itself trained: leave it out of the targets, or out of trains")
    if not chosen:
        raise ConfigError("lora: every kernel that could have an adapter is itself trained: leave 'lora' out of trains")
    modules = frozenset(path.removeprefix("layers/").removesuffix("/kernel") for path in chosen)
    return Adapters(lora.rank, lora.alpha / lora.rank, modules)


def _named(text: str, kernels: dict[str, str], config: Architecture) -> set[str]:
    target = Selection.parse(text, config.num_hidden_layers, "lora.targets")
    if target.group not in ADAPTABLE:
        raise ConfigError(f"lora.targets: {text!r}: only {', '.join(ADAPTABLE)} can have adapters")
    if target.layers is not None:
        raise ConfigError(f"lora.targets: {text!r}: adapters are always in all layers: leave out the range")
    if target.group not in kernels.values():
        present = ", ".join(sorted({*kernels.values()}))
        raise ConfigError(f"lora.targets: this model has no {target.group}: it has {present}")
    found = {path for path, group in kernels.items() if target.takes(path, group)}
    if not found:
        names = sorted({path.split("/")[-2] for path, group in kernels.items() if group == target.group})
        raise unknown_key(f"kernel of lora.targets in {target.group}", target.name, names)
    return found
