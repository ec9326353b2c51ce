"""The units of a sweep file: names, and the changes to its config."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mono_jax.errors import ConfigError
from mono_jax.runs import config_file
from mono_jax.runs.stage_keys import BY_STAGE

T = TypeVar("T")
Changes = Mapping[str, Any]

SEED = "seed"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=,-]*")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run of a sweep.

    Attributes:
      name: name of its folder; ``group``, plus the seed if the group has several.
      group: what is compared; the units of a group differ only in their seeds.
      seed: None for a group of one unit.
      changes: {dotted key: value}, including the seed's keys.
      config: FILE[:ARG] that is changed.
    """

    name: str
    group: str
    seed: int | None
    changes: dict[str, Any]
    config: str

    def values(self) -> dict[str, Any]:
        """The config with the changes, as nested dicts. Raises ConfigError that names the unit and the key."""
        config = config_file.load(self.config)
        try:
            for key, value in self.changes.items():
                if key != "stages":
                    config_file.assign(config, key, value)
            values = config_file.values_of(config, self.config)
            if "stages" in self.changes:
                values |= _chosen(values, self.changes["stages"])
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        return values


def _chosen(values: Mapping[str, Any], folders: Sequence[str]) -> dict[str, Any]:
    """The stages of ``folders``, in that order, and other keys without their entries for the stages that are left
    out."""
    stages = values.get("stages", {})
    if not isinstance(folders, (list, tuple)) or not all(isinstance(folder, str) for folder in folders):
        raise ConfigError(f"stages is {folders!r}: list the folders of the stages that run, in order")
    for folder in folders:
        if folder not in stages:
            raise ConfigError(f"stages: no stage {folder!r}; the config has {', '.join(stages) or 'none'}")
        if folders.count(folder) > 1:
            raise ConfigError(f"stages lists {folder!r} twice: for a second run, add a stage with a name of its own")
    left_out = set(stages) - set(folders)
    of_stages = {key: values[key] for key in BY_STAGE if isinstance(values.get(key), Mapping)}
    kept = {key: {name: of[name] for name in of if name not in left_out} for key, of in of_stages.items()}
    return kept | {"stages": {folder: stages[folder] for folder in folders}}


def flat(changes: Changes) -> dict[str, Any]:
    """``changes`` with a dotted key for each value; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in changes.items():
        inner = flat(value) if isinstance(value, Mapping) else {}
        found |= {f"{key}.{name}": leaf for name, leaf in inner.items()} or {key: value}
    return found


def overwritten(earlier: Changes, later: Changes) -> str | None:
    """The first key of ``earlier`` whose value would be lost if the keys of ``later`` were assigned after it.

    "stages", a list that only selects, overwrites no key of a stage.
    """
    sections = tuple(f"{key}." for key in later if key != "stages")
    return next((key for key in flat(earlier) if key in later or key.startswith(sections)), None)


class Units:
    """The object that a sweep file gets as ``add``; it collects the units.

    >>> add("frozen", {"stages.s1_3.stage": "S1.3-frozen-attention"}, seeds=3)

    ``changes``: {dotted key of the config: value}. A list under "stages" chooses and orders the stages that run.
    ``seeds``: the number of units in the group; each has its own seed, 0, 1, ... (under ``seed_keys``).
    ``config``: FILE[:ARG] instead of the sweep's. ``add.base``: the sweep's config, to read numbers from.
    """

    def __init__(self, config: str | None, seed_keys: Sequence[str], file: str):
        self.units: list[Unit] = []
        self._config, self._seed_keys, self._file = config, tuple(seed_keys), file

    @property
    def base(self) -> ConfigDict:
        """A copy of the sweep's config; raises ConfigError if the sweep has none."""
        if self._config is None:
            raise ConfigError(f'{self._file}: give CONFIG = "FILE[:ARG]"')
        return config_file.load(self._config)

    def __call__(self, name: str, changes: Changes | None = None, *, seeds: int = 1, config: str | None = None) -> None:
        config = config or self._config
        if config is None:
            raise ConfigError(f'{self._file}: give CONFIG = "FILE[:ARG]", or add(..., config=...)')
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{self._file}: {name!r} is not a valid name for a unit: use letters, digits and _ . + = , -"
            )
        if seeds < 1:
            raise ConfigError(f"{self._file}: {name}: seeds is {seeds}: give 1 or more")
        if name in {other.group for other in self.units}:
            raise ConfigError(f"{self._file}: add() is called twice for {name!r}: give each group a name of its own")
        several, changes = seeds > 1, self._in_order(name, changes or {})
        if several and (lost := overwritten(changes, dict.fromkeys(self._seed_keys))):
            raise ConfigError(f"{self._file}: {name}: {lost} is overwritten by seeds={seeds}: leave one of them out")
        for seed in range(seeds):
            own = changes | dict.fromkeys(self._seed_keys if several else (), seed)
            unit = Unit(f"{name}-{SEED}{seed}" if several else name, name, seed if several else None, own, config)
            if unit.name in {other.name for other in self.units}:
                raise ConfigError(f"{self._file}: two units are called {unit.name!r}")
            self.units.append(unit)

    def _in_order(self, name: str, changes: Changes) -> dict[str, Any]:
        """A copy; raises ConfigError for a key whose value a later one would replace."""
        found: dict[str, Any] = {}
        for key, value in changes.items():
            if lost := overwritten(found, {key: value}):
                raise ConfigError(f"{self._file}: {name}: {lost} is overwritten by {key}: give {key} first")
            found[key] = value
        return found


def product(*axes: Mapping[str, Changes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every choice of one entry per axis, each axis a mapping {label: changes}, as (labels joined by "-", changes).

    Raises ConfigError that names a key that two axes change.

    >>> list(product({"a": {"x": 1}}, {"low": {"y": 0}, "high": {"y": 9}}))
    [('a-low', {'x': 1, 'y': 0}), ('a-high', {'x': 1, 'y': 9})]
    """
    for chosen in itertools.product(*(axis.items() for axis in axes)):
        name, joined = "-".join(label for label, _ in chosen), {}
        for label, changes in chosen:
            if lost := overwritten(joined, changes):
                raise ConfigError(f"product: {name}: {lost} is overwritten by {label!r}: give it on one axis only")
            joined |= changes
        yield name, joined


def values(key: str, *choices: Any, label: str | None = None) -> dict[str, dict[str, Any]]:
    """An axis for ``product``: one key with several values, labelled "KEY=VALUE" by the last part of the key.

    >>> values("stages.s2.optim.learning_rate", 1e-3, 2e-3, label="lr")
    {'lr=0.001': {'stages.s2.optim.learning_rate': 0.001}, 'lr=0.002': {'stages.s2.optim.learning_rate': 0.002}}
    """
    name = label or key.rpartition(".")[2]
    return {f"{name}={choice}": {key: choice} for choice in choices}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file: its title (the first line of its docstring) and its units."""

    file: Path
    title: str
    units: list[Unit]

    @property
    def groups(self) -> list[str]:
        """The groups in the order of the file; the others are compared with the first."""
        return list(dict.fromkeys(unit.group for unit in self.units))

    def unit(self, name: str) -> Unit:
        """The unit with this name or index. Raises ConfigError."""
        for number, unit in enumerate(self.units):
            if name in (unit.name, str(number)):
                return unit
        raise ConfigError(f"{self.file}: no unit {name!r}; it has {len(self.units)}: see sweep.py expand")


def read_sweep(file: str | Path, config: str | None = None) -> Sweep:
    """The sweep in ``file``, with ``config`` if given; raises ConfigError that names the file, the unit or the key."""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path}: no such sweep file")
    module = _module(path)
    if not callable(getattr(module, "sweep", None)):
        raise ConfigError(f"{path}: a sweep file needs a function sweep(add)")
    config = config or getattr(module, "CONFIG", None)
    units = Units(config, getattr(module, "SEED_KEYS", _seed_keys(config)), str(path))
    _guarded(path, lambda: module.sweep(units))
    if not units.units:
        raise ConfigError(f"{path}: sweep(add) added no units")
    title = (module.__doc__ or path.stem).strip().splitlines()[0]
    return Sweep(path, title.rstrip("."), units.units)


def _seed_keys(config: str | None) -> tuple[str, ...]:
    """Keys of the seeds of random weights and of the data order, in a config of one stage or of several."""
    several = config is None or "stages" in config_file.load(config)
    return ("common.seed", "data.seed") if several else ("seed", "data.seed")


def _module(path: Path) -> ModuleType:
    if path.suffix != ".py":
        raise ConfigError(f"{path}: a sweep is a Python file (.py) with sweep(add)")
    return _guarded(path, lambda: config_file.module_of(path))


def _guarded(path: Path, call: Callable[[], T]) -> T:
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
