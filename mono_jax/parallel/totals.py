"""Integers summed over the processes of a run, step by step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAG = 2  # steps between dispatching a step and reading its results
_BITS = 20  # a number is sent as two 32-bit halves, which up to 2,048 processes can sum


class Totals:
    """The sums of each step's numbers. With several processes they are read ``LAG`` steps late, since reading them
    means waiting for the step. Every process then sees the sums of the same step, and so makes the same decision.

    Attributes:
      lag: number of steps by which ``latest`` lags.
    """

    def __init__(self) -> None:
        self._steps: dict[int, tuple[tuple[str, ...], dict[str, int] | jax.Array]] = {}
        self.lag = LAG if jax.process_count() > 1 else 0
        if self.lag:
            first = {device.process_index: device for device in reversed(jax.devices())}
            mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
            self._split = NamedSharding(mesh, PartitionSpec("process"))
            self._sum = jax.jit(lambda a: jnp.sum(a, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def add(self, step: int, values: Mapping[str, int], after: Any = ()) -> None:
        """This process's numbers of ``step``, below 2**51; all processes must give the same names, at every step.

        ``after``: arrays of the step. Accelerators run programs in the order given; on CPUs two programs running at
        once would share one connection, so there each waits for the other.
        """
        names = tuple(sorted(values))
        for old in [other for other in self._steps if other <= step - 2 * LAG]:
            del self._steps[old]
        if not self.lag:
            self._steps[step] = names, dict(values)
            return
        halves = np.array([[divmod(int(values[name]), 1 << _BITS) for name in names]], np.int32)
        shape = (jax.process_count(), *halves.shape[1:])
        in_turn = jax.block_until_ready if jax.default_backend() == "cpu" else lambda arrays: arrays
        in_turn(after)
        self._steps[step] = (
            names,
            in_turn(self._sum(jax.make_array_from_callback(shape, self._split, lambda _: halves))),
        )

    def of(self, step: int) -> dict[str, int]:
        """The sums of ``step``, one of the last ``2 * LAG``."""
        names, values = self._steps[step]
        if isinstance(values, jax.Array):
            high, low = np.asarray(values, np.int64).reshape(-1, 2).T
            values = dict(zip(names, (high * (1 << _BITS) + low).tolist()))
            self._steps[step] = names, values
        return values

    def latest(self, step: int) -> dict[str, int]:
        """The newest sums that are available at ``step`` without waiting; {} if there are none."""
        return self.of(step - self.lag) if step - self.lag in self._steps else {}
