"""Results of a kernel benchmark run so far: one record per point, written immediately."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.devices import device_key


class Results:
    """kernels.json: a header that describes the environment, and a list of records, one per point.

    A record has "kind" (check, bound, trial, tuned, time), "about", and either its findings or "failed".
    """

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder, self.content = folder, content
        self._by_point = {_point(record["about"], record["kind"]): record for record in content["records"]}

    @classmethod
    def load(cls, folder: Path) -> Results | None:
        """The results in --out, or None."""
        file = folder / "kernels.json"
        return cls(folder, json.loads(file.read_text())) if file.is_file() else None

    def save(self) -> None:
        """Writes the results so far, because the machine may be taken away at any time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "kernels.json.part"
        partial.write_text(json.dumps(self.content, indent=1))
        partial.replace(self.folder / "kernels.json")

    def find(self, kind: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a point, or None."""
        return self._by_point.get(_point(about, kind))

    def begin(self, kind: str, about: Mapping[str, Any]) -> None:
        """Records the current point, so that it can be blamed if the process dies."""
        self.content["running"] = {"kind": kind, "about": dict(about)}
        self.save()

    def end(self, findings: Mapping[str, Any]) -> dict[str, Any]:
        """Records the findings of the current point."""
        running = self.content.pop("running")
        record = self._by_point[_point(running["about"], running["kind"])] = running | dict(findings)
        self.content["records"].append(record)
        self.save()
        return record

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All records of one kind."""
        return [record for record in self.content["records"] if record["kind"] == kind]

    def forget_failures(self) -> None:
        """Drops failed points, so that they are tried again."""
        self.content["records"] = [record for record in self.content["records"] if "failed" not in record]
        self._by_point = {point: record for point, record in self._by_point.items() if "failed" not in record}


def _point(about: Mapping[str, Any], kind: str) -> str:
    return kind + json.dumps(about, sort_keys=True)


def header(dry_run: bool) -> dict[str, Any]:
    """What the figures depend on; a run resumes only if all of this is unchanged."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "triton", "jax-triton", "tokamax", "numpy")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0].device_kind
    return {"dry_run": dry_run, "device": device, "device_key": device_key(), "versions": versions}
