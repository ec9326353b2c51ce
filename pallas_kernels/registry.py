"""Names of implementations, tuning tables, and the selection of an implementation."""

from __future__ import annotations

import functools
import importlib
import json
import logging
from importlib import resources
from typing import Any, ClassVar, Protocol

from pallas_kernels.errors import Unavailable

log = logging.getLogger(__name__)

# Modules are imported on first use: `import pallas_kernels` must not pull in CUDA or TPU code (or jax, since --help
# needs the names). Names of attention implementations begin with "attention/".
IMPLEMENTATIONS = {
    "xla_split": "pallas_kernels.experts.backends.xla:XlaSplit",
    "dense_both": "pallas_kernels.experts.backends.xla:DenseBoth",
    "xla_tiled": "pallas_kernels.experts.backends.xla:XlaTiled",
    "ragged": "pallas_kernels.experts.backends.xla:Ragged",
    "pallas_tpu": "pallas_kernels.experts.backends.tpu:PallasTpu",
    "mosaic_gpu": "pallas_kernels.experts.backends.mosaic:MosaicGpu",
    "triton": "pallas_kernels.experts.backends.triton:Triton",
    "attention/xla": "pallas_kernels.attention.backends.xla:Xla",
    "attention/xla_chunked": "pallas_kernels.attention.backends.xla:XlaChunked",
    "attention/xla_blocked": "pallas_kernels.attention.backends.xla_blocked:XlaBlocked",
    "attention/pallas_tpu": "pallas_kernels.attention.backends.tpu:PallasTpu",
    "attention/splash": "pallas_kernels.attention.backends.splash:Splash",
    "attention/mosaic_gpu": "pallas_kernels.attention.backends.mosaic:MosaicGpu",
    "attention/cudnn": "pallas_kernels.attention.backends.cudnn:Cudnn",
    "attention/cudnn_masked": "pallas_kernels.attention.backends.cudnn:CudnnMasked",
}


class Problem(Protocol):
    """What an implementation is chosen for; hashable. The full definitions are in the contracts of the two rooms.

    Attributes:
      ROOM: folder of tuning tables, "experts" or "attention".
      EXACT: fields in which an entry of a tuning table must agree.
      SIZE: the field by which entries scale: the entry with the largest size not above the problem's is used.
      device: key of a tuning table.
    """

    ROOM: ClassVar[str]
    EXACT: ClassVar[tuple[str, ...]]
    SIZE: ClassVar[str]

    device: str


class Implementation(Protocol):
    """An implementation that can be chosen; its fields are tuning parameters."""

    name: str

    def unsupported(self, problem: Any) -> str | None:
        """Why this implementation cannot serve ``problem``, or None if it can."""


def room(name: str) -> str:
    """The room that an implementation belongs to: "experts" or "attention"."""
    return name.split("/")[0] if "/" in name else "experts"


def implementation_class(name: str) -> type[Any]:
    """The class registered under ``name``; ``Unavailable`` if its module cannot be imported here."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    module, attribute = IMPLEMENTATIONS[name].split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise Unavailable(f"{name}: {error}") from error


@functools.cache
def tuning_table(room: str, device: str) -> dict[str, Any]:
    """The JSON table of a device; otherwise that of its platform ("tpu", "nvidia"), or that of the CPU.

    "order" lists names by preference; {"name": ..., "up_to": N} applies only to sizes up to N. "parameters" has, for
    each name, a "default" and "entries", each with the sizes that it was tuned for.
    """
    folder = resources.files("pallas_kernels") / "tuning" / room
    for name in (device, device.split("_")[0], "cpu"):
        if (file := folder / f"{name}.json").is_file():
            return json.loads(file.read_text())
    raise FileNotFoundError(f"no tuning table for {device} and none for cpu in {folder}")


def resolve(implementation: str | Implementation | None, problem: Problem) -> Any:
    """An instance that serves ``problem``; raises ``Unavailable`` with the reason(s) if there is none."""
    if implementation is None:
        return choose(problem)
    if isinstance(implementation, str):
        implementation = implementation_class(implementation)(**tuned_parameters(implementation, problem))
    if reason := implementation.unsupported(problem):
        raise Unavailable(f"{implementation.name} cannot serve {problem}: {reason}")
    return implementation


@functools.cache
def choose(problem: Problem) -> Any:
    """The first implementation in the tuning table's order of preference that can serve ``problem``.

    Raises:
      Unavailable: none can; the message says why each of them refused.
    """
    refusals = []
    for name in preferred(problem):
        try:
            candidate = implementation_class(name)(**tuned_parameters(name, problem))
            reason = candidate.unsupported(problem)
        except Unavailable as error:
            reason = str(error)
        if reason is None:
            # Cached, hence logged once per problem.
            log.info("%s: %s%s", problem, candidate, f" (not {'; '.join(refusals)})" if refusals else "")
            return candidate
        refusals.append(f"{name}: {reason}")
    raise Unavailable(f"no implementation serves {problem}: {'; '.join(refusals)}")


def tuned_parameters(name: str, problem: Problem) -> dict[str, Any]:
    """Tuning parameters of implementation ``name``: the defaults, updated by the entry that fits best."""
    table = tuning_table(problem.ROOM, problem.device)["parameters"].get(name, {})
    parameters = dict(table.get("default", {}))
    fits = [
        entry
        for entry in table.get("entries", [])
        if all(entry[key] == getattr(problem, key) for key in problem.EXACT)
        and entry[problem.SIZE] <= getattr(problem, problem.SIZE)
    ]
    if fits:
        parameters |= max(fits, key=lambda entry: entry[problem.SIZE])["parameters"]
    return parameters


def preferred(problem: Problem) -> list[str]:
    """The names in order of preference for a problem of this size."""
    entries = [
        {"name": entry} if isinstance(entry, str) else entry
        for entry in tuning_table(problem.ROOM, problem.device)["order"]
    ]
    size = getattr(problem, problem.SIZE)
    return [entry["name"] for entry in entries if size <= entry.get("up_to", size)]
