"""Names of implementations, tuning tables, and the choice among them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import json
import logging
from collections.abc import Iterator
from importlib import resources

import jax

from pallas_kernels.experts.contract import Implementation, Problem, Unavailable

log = logging.getLogger(__name__)
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)

# Modules are imported when first asked for: `import pallas_kernels` must not pull in CUDA or TPU code.
IMPLEMENTATIONS = {
    "xla_split": "pallas_kernels.experts.backends.xla:XlaSplit",
    "dense_both": "pallas_kernels.experts.backends.xla:DenseBoth",
    "xla_tiled": "pallas_kernels.experts.backends.xla:XlaTiled",
    "ragged": "pallas_kernels.experts.backends.xla:Ragged",
    "pallas_tpu": "pallas_kernels.experts.backends.tpu:PallasTpu",
    "mosaic_gpu": "pallas_kernels.experts.backends.mosaic:MosaicGpu",
    "triton": "pallas_kernels.experts.backends.triton:Triton",
}


def implementation_class(name: str) -> type[Implementation]:
    """The class registered under `name`; `Unavailable` if its module cannot be imported here."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    module, attribute = IMPLEMENTATIONS[name].split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise Unavailable(f"{name}: {error}") from error


@contextlib.contextmanager
def targeting(device: str | jax.Device) -> Iterator[None]:
    """Choose for an absent device (a key or a described device) while tracing, for ahead-of-time compilation."""
    token = _target.set(device if isinstance(device, str) else device_key(device))
    try:
        yield
    finally:
        _target.reset(token)


def device_key(device: jax.Device | None = None) -> str:
    """Key of a device's tuning table: "cpu", "tpu_v5e", "nvidia_h200", ... By default the device that is traced for."""
    if device is None:
        if target := _target.get():
            return target
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    kind = "_".join(device.device_kind.lower().replace("-", " ").split())
    # XLA's names: "TPU v5 lite" is v5e, "TPU v5" is v5p, "TPU v6 lite" is v6e.
    return {"tpu_v5": "tpu_v5p"}.get(kind, kind.replace("_lite", "e"))


def is_hopper(device: str) -> bool:
    """Whether the device of a key has compute capability 9.0: H100, H200, H800, GH200."""
    return any(chip in device for chip in ("h100", "h200", "h800"))


@functools.cache
def tuning_table(device: str) -> dict:
    """The JSON table of a device, or that of its platform ("tpu", "nvidia"), or that of the CPU."""
    folder = resources.files("pallas_kernels") / "tuning"
    for name in (device, device.split("_")[0], "cpu"):
        if (file := folder / f"{name}.json").is_file():
            return json.loads(file.read_text())
    raise FileNotFoundError(f"no tuning table for {device} and none for cpu in {folder}")


def resolve(implementation: str | Implementation | None, problem: Problem) -> Implementation:
    """An instance that serves `problem`; `Unavailable` with the reason(s) if there is none."""
    if implementation is None:
        return choose(problem)
    if isinstance(implementation, str):
        implementation = implementation_class(implementation)(**tuned_parameters(implementation, problem))
    if reason := implementation.unsupported(problem):
        raise Unavailable(f"{implementation.name} cannot serve {problem}: {reason}")
    return implementation


@functools.cache
def choose(problem: Problem) -> Implementation:
    """The first implementation in the tuning table's order of preference that can serve `problem`.

    Raises:
      Unavailable: none can; the message says why each of them refused.
    """
    refusals = []
    for name in tuning_table(problem.device)["order"]:
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


def tuned_parameters(name: str, problem: Problem) -> dict:
    """Tuning parameters of implementation `name`: the entry that fits best, on top of the defaults."""
    table = tuning_table(problem.device)["parameters"].get(name, {})
    parameters = dict(table.get("default", {}))
    fits = [
        entry
        for entry in table.get("entries", [])
        if all(entry[key] == getattr(problem, key) for key in ("op", "dtype", "d", "ff"))
        and entry["rows"] <= problem.rows
    ]
    if fits:
        parameters |= max(fits, key=lambda entry: entry["rows"])["parameters"]
    return parameters
