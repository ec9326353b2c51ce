"""Times one program of the kernel benchmark: fresh random inputs, cold caches, medians of kernel times."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernels.problems import Setting
from experiments.benchmarks.kernels.rows import Maker, Program, dense_both

L2_BYTES = 64 * 2**20  # more than any GPU measured here so far has (H100, H200: 50 MB)
LEAST_INPUTS = 3


@dataclasses.dataclass(frozen=True)
class Effort:
    """How often a program runs: warm-up calls, timed samples, and calls queued per wall time."""

    warm_up: int = 3
    samples: int = 15
    queue: int = 4


REHEARSAL = Effort(warm_up=0, samples=1, queue=1)


@functools.cache
def compiled(function: Callable[..., jax.Array], trained: tuple[int, ...] | None) -> Callable:
    """jit of the function, or of the function and its gradients; the cotangent is the first argument."""
    if trained is None:
        return jax.jit(lambda _, *arguments: function(*arguments))

    def run(dy, *arguments):
        def of_trained(*chosen):
            full = list(arguments)
            for number, value in zip(trained, chosen):
                full[number] = value
            return function(*full)

        y, backward = jax.vjp(of_trained, *(arguments[number] for number in trained))
        return y, backward(dy)

    return jax.jit(run)


class Timer:
    """Medians over calls on different inputs: of kernel times from CUPTI if that works, else of wall times.

    Wall times are those of calls queued one after another, so that host work is hidden behind device work.
    """

    def __init__(self, effort: Effort):
        self.effort = effort
        self.name = "wall"
        if jax.default_backend() == "gpu":
            try:
                kernel_times(jax.jit(jnp.sin), [(jnp.ones(8),)])
                self.name = "cupti"
            except Exception as error:  # no permission, another profiler attached, ...
                print(f"CUPTI: {error}; using wall times instead", file=sys.stderr)

    def __call__(self, function: Callable, inputs: Sequence[tuple]) -> dict[str, Any]:
        """{"median_us", "min_us", "wall_us", "timer"} of function(*inputs[i]), i cycling."""
        effort = self.effort
        for i in range(effort.warm_up):
            jax.block_until_ready(function(*inputs[i % len(inputs)]))
        wall = []
        for sample in range(effort.samples):
            start = time.perf_counter()
            for i in range(effort.queue):
                result = function(*inputs[(sample + i) % len(inputs)])
            jax.block_until_ready(result)
            wall.append((time.perf_counter() - start) / effort.queue * 1e6)
        device, name = wall, "wall"
        if self.name == "cupti":
            try:
                device = kernel_times(function, [inputs[i % len(inputs)] for i in range(effort.samples)])
                name = "cupti"
            except Exception as error:
                print(f"  CUPTI: {error}; using wall time instead", file=sys.stderr)
        median, least = statistics.median(device), min(device)
        return {"median_us": median, "min_us": least, "wall_us": statistics.median(wall), "timer": name}


def kernel_times(function: Callable, inputs: Sequence[tuple]) -> list[float]:
    """Microseconds that the kernels of each call take, added up.

    ``jax.experimental.mosaic.gpu.profiler.measure`` does the same for one call on inputs that it has just used, so that
    they are in the L2 cache; here, consecutive calls have different inputs.
    """
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext  # private: there is no public name for it
    jax.block_until_ready(function(*inputs[-1]))
    cupti._cupti_init()
    try:
        for arguments in inputs:
            jax.block_until_ready(function(*arguments))
    finally:
        kernels = cupti._cupti_get_timings(True)
    each, rest = divmod(len(kernels), len(inputs))
    if rest or not each:
        raise RuntimeError(f"{len(kernels)} kernels in {len(inputs)} calls")
    milliseconds = [took for _, took in kernels]
    return [1e3 * sum(milliseconds[i : i + each]) for i in range(0, len(kernels), each)]


@dataclasses.dataclass(eq=False)
class Bench:
    """Makes inputs, compares results with ``dense_both``, and takes times."""

    timer: Timer

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one object, one size at a time: the arrays are large)
    def weights(self, op: str, shape: str, dtype: str) -> list[tuple[Any, Any]]:
        """(text, visual) weights of unit gain, with as many more copies as it takes to exceed the L2 cache."""
        one_size = Setting(op, shape, 0, 0, 0, dtype, 1).weight_shapes()
        shapes, structure = jax.tree.flatten(one_size, is_leaf=lambda s: isinstance(s[0], int))

        def expert(seed: int) -> Any:
            keys = jax.random.split(jax.random.key(seed), len(shapes))
            arrays = [jax.random.normal(k, s, jnp.float32) * s[0] ** -0.5 for k, s in zip(keys, shapes)]
            return structure.unflatten([a.astype(dtype) for a in arrays])

        of_expert = sum(map(math.prod, shapes)) * jnp.dtype(dtype).itemsize
        copies = min(math.ceil(2 * L2_BYTES / of_expert), 8)
        return [(expert(2 * i), expert(2 * i + 1)) for i in range(1 if self.rehearses else copies)]

    @property
    def rehearses(self) -> bool:
        """Whether this is a rehearsal, whose times are meaningless."""
        return self.timer.effort == REHEARSAL

    def measure(self, make: Maker, setting: Setting, direction: str) -> dict[str, Any]:
        """Times, and the largest relative error of y and dx against ``dense_both`` (None for the bound).

        Raises:
          ValueError: results are not finite.
        """
        weights = self.weights(setting.op, setting.shape, setting.dtype)
        count = 1 if self.rehearses else max(LEAST_INPUTS, len(weights))
        keys = jax.random.split(jax.random.key(setting.rows), 2 * count)
        xs = [jax.random.normal(k, (setting.rows, setting.d), setting.dtype) for k in keys[:count]]
        cotangents = [jax.random.normal(k, (setting.rows, setting.out), setting.dtype) for k in keys[count:]]
        programs = [make(setting, *weights[i % len(weights)]) for i in range(count)]
        run = compiled(programs[0].function, None if direction == "forward" else programs[0].trained[direction])
        inputs = [(p.arrange(dy), p.arrange(x), *p.rest) for p, x, dy in zip(programs, xs, cotangents)]
        result = {"max_rel_error": None}
        if len(programs[0].rest) > 1:  # the bound has one expert and computes something different
            result["max_rel_error"] = self._error(
                programs[0], run(*inputs[0]), setting, xs[0], cotangents[0], direction
            )
        return result | self.timer(run, inputs)

    def _error(self, program: Program, actual, setting: Setting, x, dy, direction: str) -> float:
        reference = dense_both(setting.op)(setting, *self.weights(setting.op, setting.shape, setting.dtype)[0])
        trained = None if direction == "forward" else (0,)
        expected = jax.tree.leaves(compiled(reference.function, trained)(dy, x, *reference.rest))
        # y, and dx, which is the first gradient
        actual = [actual] if direction == "forward" else [actual[0], actual[1][0]]
        pairs = [(program.restore(a).astype(jnp.float32), e.astype(jnp.float32)) for a, e in zip(actual, expected)]
        errors = [float(jnp.max(jnp.abs(a - e)) / jnp.max(jnp.abs(e))) for a, e in pairs]
        if not all(map(math.isfinite, errors)):
            raise ValueError("results are not finite")
        return max(errors)
