"""How much of the base's text ability a run keeps: the loss on held-out text against that of the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from data_pipelines.io import publish
from mono_jax.evaluation.heldout import Loss
from mono_jax.files import stored_json
from mono_jax.parallel.agreement import from_first, together

Known = Mapping[str, Mapping[str, str | float]]  # {source: {"data": identity, "loss": mean}}


class Retention:
    """Compares losses on plain text with those of the base, which are measured once and kept in ``file``.

    The base is the initial weights, unless an earlier run's ``base`` file has the loss of the same batches: then the
    model that that run began with.
    """

    def __init__(self, file: Path, base: Path | None, identities: Mapping[str, str]):
        """``identities``: {source: hash of everything that decides its batches}, of those that are compared."""
        self._file, self._identities = file, identities
        self._own = self._read(file)
        self._known = self._own | (self._read(base) if base is not None else {})

    def _read(self, file: Path) -> dict[str, float]:
        """The losses that are kept there of the very batches that are measured here."""
        stored: Known = from_first(stored_json(file) if jax.process_index() == 0 else {})
        return {
            name: float(kept["loss"])
            for name, kept in stored.items()
            if kept.get("data") == self._identities.get(name, "")
        }

    @property
    def lost(self) -> bool:
        """Whether a run that has begun knows no losses of a base although it should."""
        return bool(self._identities) and not self._file.is_file()

    def measure_base(self, losses: Mapping[str, Loss]) -> None:
        """Keeps the losses of the initial weights, of sources that are plain text."""
        kept = self._identities.keys()
        self._own |= {n: loss.mean for n, loss in losses.items() if n in kept and not loss.weights["image"]}
        self._known = self._own | self._known
        with together():
            if jax.process_index() == 0:
                kept = {name: {"data": self._identities[name], "loss": loss} for name, loss in self._own.items()}
                publish.write_json(self._file, kept)

    def values(self, losses: Mapping[str, Loss]) -> dict[str, float]:
        """ "retention/NAME/ratio" and "retention/NAME/nats" (loss over, and minus, the base's) of plain text."""
        found = {}
        for name, loss in losses.items():
            if name in self._known and not loss.weights["image"]:
                base = self._known[name]
                found |= {f"retention/{name}/ratio": loss.mean / base, f"retention/{name}/nats": loss.mean - base}
        return found
