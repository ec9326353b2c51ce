"""How much of the base model's text ability a run retains: its loss on held-out text compared with the base's."""

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
    """Compares losses on plain text with those of the base, which are measured once and stored in ``file``.

    The base is the initial weights, unless an earlier run's ``base`` file has the loss on the same batches: then it is
    the model that the earlier run started from.
    """

    def __init__(self, file: Path, base: Path | None, identities: Mapping[str, str]):
        """``identities``: {source: hash of everything that determines its batches}, for the sources to compare."""
        self._file, self._identities = file, identities
        self._own = self._read(file)
        self._known = self._own | (self._read(base) if base is not None else {})

    def _read(self, file: Path) -> dict[str, float]:
        """The losses stored there for exactly the batches that are measured here."""
        stored: Known = from_first(stored_json(file) if jax.process_index() == 0 else {})
        return {
            name: float(kept["loss"])
            for name, kept in stored.items()
            if kept.get("data") == self._identities.get(name, "")
        }

    @property
    def lost(self) -> bool:
        """Whether a run that has already begun is missing the losses of its base."""
        return bool(self._identities) and not self._file.is_file()

    def measure_base(self, losses: Mapping[str, Loss]) -> None:
        """Stores the losses of the initial weights on the sources that are plain text."""
        kept = self._identities.keys()
        self._own |= {n: loss.mean for n, loss in losses.items() if n in kept and not loss.weights["image"]}
        self._known = self._own | self._known
        with together():
            if jax.process_index() == 0:
                kept = {name: {"data": self._identities[name], "loss": loss} for name, loss in self._own.items()}
                publish.write_json(self._file, kept)

    def values(self, losses: Mapping[str, Loss]) -> dict[str, float]:
        """ "retention/NAME/ratio" and "retention/NAME/nats" (loss divided by, and minus, the base's) of plain text."""
        found = {}
        for name, loss in losses.items():
            if name in self._known and not loss.weights["image"]:
                base = self._known[name]
                found |= {f"retention/{name}/ratio": loss.mean / base, f"retention/{name}/nats": loss.mean - base}
        return found
