"""What a unit trains, stage by stage. Each stage is named by everything that determines it, so that units with the same
first stages share them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from data_pipelines import strict
from data_pipelines.errors import DataError
from mono_jax.errors import ConfigError
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.sets import made_sets
from mono_jax.runs.stage_checks import check_run, check_stages, local_base
from mono_jax.runs.stage_keys import BY_STAGE
from mono_jax.runs.sweeping.units import Sweep, Unit, flat

ONLY = "run"  # the folder of a config with one stage


@dataclasses.dataclass(frozen=True)
class Link:
    """A stage of a unit, or something made before the stages ("sets", "mono")."""

    folder: str
    digest: str

    @property
    def name(self) -> str:
        """The name of its folder, which all units that have this stage share."""
        return f"{self.folder}-{self.digest}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A unit with its checked config.

    Attributes:
      sets: the sets that are made; None if none are.
      mono: the base with visual experts, made before the first stage with images.
      stages: in order; the digest of each includes those before it.
      asked: the keys that decide what is measured on the held-out sets, however the stages were trained.
    """

    unit: Unit
    config: EvipConfig | RunConfig
    sets: Link | None
    mono: Link | None
    stages: tuple[Link, ...]
    asked: dict[str, Any]

    @property
    def decides(self) -> dict[str, dict[str, Any]]:
        """What decides the unit's result, as the result repeats it."""
        return {"stages": {link.folder: link.digest for link in self.stages}, "asked": self.asked}


def plan(unit: Unit) -> Plan:
    """Checks every key of the unit's config, as far as possible without data. Raises ConfigError that names the
    unit."""
    values = unit.values()
    try:
        if "stages" not in values:
            run = RunConfig.from_dict(values)
            check_run(run, local_base(run.init))
            return Plan(unit, run, None, None, (Link(ONLY, _digest(run.to_dict())),), {})
        config = EvipConfig.from_dict(values)
        return _several(unit, config)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{unit.name}: {error}") from None


def plans(sweep: Sweep) -> list[Plan]:
    """The plans of all units. Raises ConfigError that names the first unit that cannot be run."""
    return [plan(unit) for unit in sweep.units]


def repeated(planned: Sequence[Plan]) -> dict[str, str]:
    """{unit: the first unit with the same stages and measurements}, for units whose changes make no difference."""
    first: dict[str, str] = {}
    names = {each.unit.name: first.setdefault(_digest(each.decides), each.unit.name) for each in planned}
    return {name: other for name, other in names.items() if name != other}


def idle(planned: Plan) -> dict[str, str]:
    """{key: why it has no effect}, of the keys that the unit itself changes."""
    if isinstance(planned.config, RunConfig):
        return {}
    stages, idle_keys, found = planned.config.stages, planned.config.idle(), {}
    for key in flat(planned.unit.changes):
        section, _, rest = key.partition(".")
        folder = rest.partition(".")[0]
        if folder and section in ("stages", *BY_STAGE) and folder not in stages:
            found[key] = f"the unit does not run {folder}"
        elif why := [why for other, why in idle_keys.items() if f"{key}.".startswith(f"{other}.")]:
            found[key] = why[0]
    return found


def _several(unit: Unit, config: EvipConfig) -> Plan:
    check_stages(config, local_base(config.init))
    made = made_sets(config)
    sets = None if made is None else Link("sets", _digest([strict.to_dict(part) for part in made], config.vision))
    digest, mono, stages = _digest(config.sets if sets is None else sets.digest, config.init), None, []
    for number, folder in enumerate(config.stages):
        values = config.stage_values(folder, init="" if number == 0 and not config.init else "before")
        if config.stage_name(folder) != "S0" and mono is None:
            digest = _digest(digest, config.vision, config.visual_experts, config.attention_experts)
            mono = Link("mono", digest)
        own = {key: value for key, value in values.items() if key != "init"}
        scored = [config.scores[folder]] if folder in config.scores else []
        digest = _digest(digest, own, config.replay.get(folder), config.filters.get(folder), *scored)
        stages.append(Link(folder, digest))
    return Plan(unit, config, sets, mono, tuple(stages), config.asked("text") | config.asked("questions"))


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=strict.to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
