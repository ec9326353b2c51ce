"""Correctness, tuning and timing of the modality-grouped FFN kernels, in one go.

  python experiments/benchmarks/kernels.py --out=runs/kernels --dry_run        rehearsal on the CPU, seconds, no figures
  python experiments/benchmarks/kernels.py --out=runs/kernels --budget_s=1500  on a GPU or TPU, most telling sizes first
  python experiments/benchmarks/kernels.py --readme                            the README's table from committed results

Rows of the table; every time is divided by the first one's:

  dense                one expert over all tokens: the bound (with one expert trained, only its tokens' share of the
                       weight gradients is counted)
  xla_split            static boundary, two dense FFNs: what training uses
  NAME                 modality_ffn on rows grouped once per batch; NAME = mosaic_gpu, triton, pallas_tpu
  NAME permuted        the same with the permutation in every layer (gathered on load where NAME can)
  NAME unsorted        the form of the Mono-InternVL-1.5 paper: rows stay, tiles with both kinds are computed twice
  ragged_dot, tokamax  grouped matmuls of jax and tokamax on stacked weights, rows grouped
  dense_both           both experts on all tokens, chosen by mask
  gather_scatter       rows of each expert gathered, computed and scattered back in every layer, as serving engines do

Writes kernels.json (device, versions, checks, tuned parameters, every time), kernels.md, plots and a tuning table to
--out. Copy kernels.json to experiments/benchmarks/results/ under a name of its own, and the tuning table to
pallas_kernels/tuning/.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.benchmarks import kernels_report as report
from pallas_kernels.api import FfnWeights, modality_ffn, permuted_ffn, unsorted_ffn
from pallas_kernels.base import Implementation, Problem, Unavailable
from pallas_kernels.check import check
from pallas_kernels.conformance import TOLERANCE
from pallas_kernels.layout import group_rows, make_tile_map, ungroup_rows
from pallas_kernels.registry import device_key, implementation_class, tuned_parameters, tuning_table
from pallas_kernels.xla import dense_ffn, split_ffn

KERNELS = ("mosaic_gpu", "triton", "pallas_tpu")
DIRECTIONS = ("forward", "both", "visual")  # both, visual: forward and backward with these experts trained
SHAPES = {"2b": (2048, 8192), "7b": (4096, 14336)}  # (d, ff)
WARM_UP, SAMPLES = 3, 15


# ======================================================================================================================
# What is measured
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Setting:
    """One problem.

    Attributes:
      shape: key of SHAPES, or "tiny".
      d: model width.
      ff: hidden width.
      rows: tokens N.
      visual_share: of the tokens, percent.
      interleaving: tokens that have left their run, percent (0: one visual run, then text).
      tile: rows per tile of the grouped forms.
    """

    shape: str
    d: int
    ff: int
    rows: int
    visual_share: int
    interleaving: int
    tile: int

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return round(self.rows * self.visual_share / 100)

    def mask(self) -> np.ndarray:
        """bool [N], True = visual."""
        rng = np.random.default_rng(0)
        mask = np.arange(self.rows) < self.visual
        moved = rng.permutation(self.rows)[: round(self.rows * self.interleaving / 100)]
        mask[moved] = mask[rng.permutation(moved)]
        return mask


def settings(dry_run: bool, tile: int) -> Iterator[Setting]:
    """All problems, those that tell most first: a short loan of a device ends somewhere in the list."""
    if dry_run:
        tiny = functools.partial(Setting, "tiny", 128, 256, 2 * tile)
        yield from (tiny(share, mixed, tile) for share, mixed in ((50, 0), (50, 100), (100, 0)))
        return
    order = [("2b", n, 50, 0) for n in (4096, 16384)]
    order += [("2b", n, share, 0) for n in (4096, 16384) for share in (90, 0, 100)]
    order += [("2b", n, 50, 0) for n in (1024, 2048, 8192, 32768)]
    order += [("2b", n, 50, mixed) for n in (4096, 16384) for mixed in (10, 50, 90, 100)]
    order += [("7b", n, share, 0) for n in (4096, 16384) for share in (50, 90)]
    order += [("2b", n, share, 0) for n in (1024, 2048, 8192, 32768) for share in (90, 0, 100)]
    for shape, rows, share, mixed in order:
        yield Setting(shape, *SHAPES[shape], rows, share, mixed, tile)


@dataclasses.dataclass(frozen=True)
class Program:
    """One row's function with its arguments for one setting.

    Attributes:
      function: of `arguments`, returns y.
      arguments: x first, then weights, then whatever follows from the mask.
      trained: argument numbers that are differentiated, by direction.
      arrange: [N, d] in sequence order -> the order that the function wants.
      restore: the inverse.
      compiled_once: the function does not depend on the mask, so that one compilation serves all.
    """

    function: Callable[..., jax.Array]
    arguments: tuple
    trained: dict[str, tuple[int, ...]]
    arrange: Callable[[jax.Array], jax.Array] = lambda x: x
    restore: Callable[[jax.Array], jax.Array] = lambda y: y


Maker = Callable[[Setting, jax.Array, FfnWeights, FfnWeights], Program]
EXPERTS = {"both": (0, 1, 2), "visual": (0, 2)}  # of (x, text, visual, ...)
STACKED = {"both": (0, 1), "visual": (0, 1)}  # of (x, both, ...): stacked experts cannot be told apart


@functools.cache
def _static_split(visual: int) -> Callable[..., jax.Array]:
    return lambda x, text, visual_weights: split_ffn(x, visual, text, visual_weights)


def _dense(setting: Setting, x, text, visual) -> Program:
    return Program(dense_ffn, (x, visual), {"both": (0, 1), "visual": (0,)})


def _xla_split(setting: Setting, x, text, visual) -> Program:
    order = np.argsort(~setting.mask(), kind="stable")
    back = np.argsort(order)
    function = _static_split(setting.visual)
    return Program(function, (x[order], text, visual), EXPERTS, lambda v: v[order], lambda v: v[back])


def _choose_by_mask(x, text, visual, mask):
    return jnp.where(mask[:, None], dense_ffn(x, visual), dense_ffn(x, text))


def _dense_both(setting: Setting, x, text, visual) -> Program:
    return Program(_choose_by_mask, (x, text, visual, jnp.asarray(setting.mask())), EXPERTS)


def _gather_compute_scatter(x, text, visual, text_rows, visual_rows):
    y = jnp.zeros_like(x)
    for rows, weights in ((text_rows, text), (visual_rows, visual)):
        y = y.at[rows].set(dense_ffn(x[rows], weights), unique_indices=True)
    return y


def _gather_scatter(setting: Setting, x, text, visual) -> Program:
    mask = setting.mask()
    rows = (jnp.asarray(np.flatnonzero(~mask)), jnp.asarray(np.flatnonzero(mask)))
    return Program(_gather_compute_scatter, (x, text, visual, *rows), EXPERTS)


def _grouped(implementation: Implementation) -> Maker:
    def function(x, text, visual, tile_map):
        options = {"tile": tile_map.tile, "implementation": implementation}
        return modality_ffn(x, tile_map.tile_expert, text, visual, **options)

    def make(setting: Setting, x, text, visual) -> Program:
        tile_map = make_tile_map(jnp.asarray(setting.mask()), tile=setting.tile)
        arrange, restore = (functools.partial(f, tile_map=tile_map) for f in (group_rows, ungroup_rows))
        return Program(function, (arrange(x), text, visual, tile_map), EXPERTS, arrange, restore)

    return make


def _permuted(implementation: Implementation) -> Maker:
    def function(x, text, visual, tile_map):
        return permuted_ffn(x, tile_map, text, visual, implementation=implementation)

    def make(setting: Setting, x, text, visual) -> Program:
        tile_map = make_tile_map(jnp.asarray(setting.mask()), tile=setting.tile)
        return Program(function, (x, text, visual, tile_map), EXPERTS)

    return make


def _unsorted(implementation: Implementation, tile: int) -> Maker:
    def function(x, text, visual, mask):
        return unsorted_ffn(x, mask, text, visual, tile=tile, implementation=implementation)

    def make(setting: Setting, x, text, visual) -> Program:
        return Program(function, (x, text, visual, jnp.asarray(setting.mask())), EXPERTS)

    return make


def _ragged(ragged_dot: Callable[..., jax.Array]) -> Maker:
    def function(x, stacked, group_sizes):
        gate, up = (ragged_dot(x, w, group_sizes=group_sizes) for w in (stacked.gate, stacked.up))
        return ragged_dot(jax.nn.silu(gate) * up, stacked.down, group_sizes=group_sizes)

    def make(setting: Setting, x, text, visual) -> Program:
        order = np.argsort(~setting.mask(), kind="stable")
        back = np.argsort(order)
        stacked = jax.tree.map(lambda v, t: jnp.stack([v, t]), visual, text)
        sizes = jnp.array([setting.visual, setting.rows - setting.visual], jnp.int32)
        return Program(function, (x[order], stacked, sizes), STACKED, lambda v: v[order], lambda v: v[back])

    return make


def rows_of_the_table(kernels: dict[str, Implementation], tile: int, unavailable: dict[str, str]) -> dict[str, Maker]:
    """Row name -> maker, for what is there; reasons for the rest go into `unavailable`."""
    rows: dict[str, Maker] = {"dense": _dense, "xla_split": _xla_split}
    for name, implementation in kernels.items():
        rows[name] = _grouped(implementation)
        rows[f"{name} permuted"] = _permuted(implementation)
        rows[f"{name} unsorted"] = _unsorted(implementation, tile)
    rows["ragged_dot"] = _ragged(jax.lax.ragged_dot)
    if importlib.util.find_spec("tokamax"):
        import tokamax

        rows["tokamax"] = _ragged(tokamax.ragged_dot)
    else:
        unavailable["tokamax"] = "not installed (pip install tokamax)"
    return rows | {"dense_both": _dense_both, "gather_scatter": _gather_scatter}


# ======================================================================================================================
# Timing
# ======================================================================================================================


@functools.cache
def _compiled(function: Callable[..., jax.Array], trained: tuple[int, ...] | None) -> Callable:
    """jit of the function, or of the function and its gradients for a cotangent that comes first."""
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
    """Medians over calls on different random inputs: of kernel times from CUPTI where that works, else of wall time.

    Wall times are of calls queued one after the other, so that the host's work hides behind the device's.
    """

    def __init__(self, samples: int):
        self.samples = samples
        self.cupti = None
        if jax.default_backend() == "gpu":
            from jax.experimental.mosaic.gpu import profiler

            try:
                profiler.measure(jax.jit(jnp.sin))(jnp.ones(8))
                self.cupti = profiler.measure
            except Exception as error:  # no permission, another profiler attached, ...
                print(f"CUPTI: {error}; wall times instead", file=sys.stderr)

    @property
    def name(self) -> str:
        return "cupti" if self.cupti else "wall"

    def __call__(self, function: Callable, inputs: Sequence[tuple]) -> dict[str, float]:
        """{"median_us", "min_us", "wall_us"} of function(*inputs[i]), i cycling."""
        for i in range(WARM_UP):
            jax.block_until_ready(function(*inputs[i % len(inputs)]))
        wall, queue = [], 4
        for sample in range(self.samples):
            start = time.perf_counter()
            for i in range(queue):
                result = function(*inputs[(sample + i) % len(inputs)])
            jax.block_until_ready(result)
            wall.append((time.perf_counter() - start) / queue * 1e6)
        device = wall
        if self.cupti:
            measured = self.cupti(function)
            device = [measured(*inputs[i % len(inputs)])[1] * 1e3 for i in range(self.samples)]
        return {"median_us": statistics.median(device), "min_us": min(device), "wall_us": statistics.median(wall)}


@dataclasses.dataclass(eq=False)
class Bench:
    """Inputs, reference values and times; times are shared by settings that do not change them."""

    timer: Timer
    dtype: jnp.dtype
    copies: int

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one object, one shape at a time: the arrays are large)
    def weights(self, d: int, ff: int) -> tuple[FfnWeights, FfnWeights]:
        def expert(seed: int) -> FfnWeights:
            keys = jax.random.split(jax.random.key(seed), 3)
            shapes = ((d, ff), (d, ff), (ff, d))
            arrays = (jax.random.normal(k, s, jnp.float32) * s[0] ** -0.5 for k, s in zip(keys, shapes))
            return FfnWeights(*(a.astype(self.dtype) for a in arrays))

        return expert(1), expert(2)

    def measure(self, make: Maker, setting: Setting, direction: str) -> dict[str, Any]:
        """Times and the largest relative error of y and dx against `dense_both`."""
        keys = jax.random.split(jax.random.key(setting.rows), 2 * self.copies)
        drawn = [jax.random.normal(k, (setting.rows, setting.d), self.dtype) for k in keys]
        xs, cotangents = drawn[: self.copies], drawn[self.copies :]
        weights = self.weights(setting.d, setting.ff)
        program = make(setting, xs[0], *weights)
        run = _compiled(program.function, None if direction == "forward" else program.trained[direction])
        rest = program.arguments[1:]
        inputs = [(program.arrange(dy), program.arrange(x), *rest) for x, dy in zip(xs, cotangents)]
        result = {"max_rel_error": self._error(program, run, inputs[0], setting, xs[0], cotangents[0], direction)}
        return result | self.timer(run, inputs)

    def _error(self, program, run, inputs, setting, x, dy, direction) -> float | None:
        if program.function is dense_ffn:
            return None  # the bound computes something else
        reference = _dense_both(setting, x, *self.weights(setting.d, setting.ff))
        trained = None if direction == "forward" else (0,)
        expected = jax.tree.leaves(_compiled(reference.function, trained)(dy, *reference.arguments))
        actual = run(*inputs)
        # y, and dx, which is the first gradient
        actual = [actual] if direction == "forward" else [actual[0], actual[1][0]]
        pairs = zip((program.restore(a) for a in actual), expected)
        return max(float(jnp.max(jnp.abs(a - e)) / jnp.max(jnp.abs(e))) for a, e in pairs)


# ======================================================================================================================
# Tuning
# ======================================================================================================================


def tune(bench: Bench, name: str, implementation: Implementation, setting: Setting) -> dict[str, Any]:
    """Field by field, the value with which forward + backward is fastest; only what differs from the default."""

    def microseconds(candidate: Implementation) -> float:
        try:
            timed = bench.measure(_grouped(candidate), setting, "both")
        except Exception as error:  # a tiling that does not compile or fit is no candidate
            print(f"  {name} {candidate}: {_one_line(error)}", file=sys.stderr)
            return float("inf")
        return timed["median_us"] if timed["max_rel_error"] < 2 * TOLERANCE["bfloat16"] else float("inf")

    best, chosen = microseconds(implementation), {}
    for field, values in implementation.tuning_space().items():
        for value in values:
            trial = chosen | {field: value}
            if (took := microseconds(dataclasses.replace(implementation, **trial))) < best:
                best, chosen = took, trial
    return {"parameters": chosen, "median_us": best}


def tuning_json(device: str, tuned: dict[str, list[dict]], timings: list[dict]) -> dict[str, Any]:
    """The device's tuning table with what was found: entries per size, and the order of preference by measured time."""
    table = json.loads(json.dumps(tuning_table(device)))
    table |= {"device": device, "source": f"experiments/benchmarks/kernels.py, {datetime.date.today()}"}
    for name, entries in tuned.items():
        table["parameters"].setdefault(name, {})["entries"] = entries
    forward_and_backward = {t["row"]: t["median_us"] for t in reversed(timings) if t["direction"] == "both"}
    measured = sorted((n for n in table["order"] if n in forward_and_backward), key=forward_and_backward.get)
    table["order"] = measured + [name for name in table["order"] if name not in measured]
    return table


# ======================================================================================================================
# The whole run
# ======================================================================================================================


def available_kernels(dry_run: bool, problem: Problem, unavailable: dict[str, str]) -> dict[str, Implementation]:
    """Kernels that serve here (interpreted in a rehearsal); reasons for the others go into `unavailable`."""
    kernels = {}
    for name in KERNELS:
        try:
            kind = implementation_class(name)
            instance = kind.here() if dry_run else kind(**tuned_parameters(name, problem))
        except Unavailable as reason:
            unavailable[name] = str(reason)
            continue
        if reason := instance.unsupported(problem):
            unavailable[name] = reason
        else:
            kernels[name] = instance
    return kernels


def versions() -> dict[str, str]:
    """Installed versions of what the figures depend on."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "triton", "jax-triton", "tokamax", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": sys.version.split()[0]}


def run(options) -> dict[str, Any]:
    start = time.monotonic()
    dtype = jnp.dtype(options.dtype or ("float32" if options.dry_run else "bfloat16"))
    first = next(settings(options.dry_run, options.tile))
    problem = Problem("ffn", first.rows, first.tile, first.d, first.ff, dtype.name, device_key())
    result: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "dry_run": options.dry_run,
        "device": jax.devices()[0].device_kind,
        "device_key": device_key(),
        "versions": versions(),
        "dtype": dtype.name,
        "tile": options.tile,
        "unavailable": {},
        "checks": {},
        "tuned": {},
        "timings": [],
        "not_measured": [],
    }
    timer = Timer(2 if options.dry_run else SAMPLES)
    result["timer"] = timer.name
    bench = Bench(timer, dtype, copies=3)

    kernels = available_kernels(options.dry_run, problem, result["unavailable"])
    kernels = {name: kernel for name, kernel in kernels.items() if not options.rows or name in options.rows}
    for name in kernels:
        print(f"checking {name}", file=sys.stderr)
        result["checks"][name] = check(name, compile_ahead=False)
        if result["checks"][name]["failed"]:
            print(f"  {'; '.join(result['checks'][name]['failed'])}", file=sys.stderr)
        save(options.out, result)

    for name, kernel in [] if options.no_tune else kernels.items():
        print(f"tuning {name}", file=sys.stderr)
        found = tune(bench, name, kernel, first)
        kernels[name] = dataclasses.replace(kernel, **found["parameters"])
        entry = {"op": "ffn", "dtype": dtype.name, "d": first.d, "ff": first.ff, "rows": first.rows}
        result["tuned"][name] = [entry | found]
        save(options.out, result)

    makers = rows_of_the_table(kernels, options.tile, result["unavailable"])
    wanted = {name: make for name, make in makers.items() if not options.rows or name.split()[0] in options.rows}
    for setting in settings(options.dry_run, options.tile):
        if time.monotonic() - start > options.budget_s:
            result["not_measured"].append(dataclasses.asdict(setting))
            continue
        print(f"timing {setting}", file=sys.stderr)
        time_setting(bench, {"dense": makers["dense"], **wanted}, setting, result)
        save(options.out, result)
    save(options.out, result)
    return result


def time_setting(bench: Bench, rows: dict[str, Maker], setting: Setting, result: dict[str, Any]) -> None:
    """Appends one timing per row and direction; `ratio` is to the dense bound of the same direction."""
    for direction in DIRECTIONS:
        bound = dense_bound(bench, setting, direction)
        for name, make in rows.items():
            entry = {"row": name, "direction": direction, **dataclasses.asdict(setting)}
            try:
                entry |= bound if name == "dense" else bench.measure(make, setting, direction)
            except Exception as error:  # one row that fails must not cost the others their time on the device
                result["timings"].append(entry | {"error": _one_line(error)})
                print(f"  {name} {direction}: {_one_line(error)}", file=sys.stderr)
                continue
            result["timings"].append(entry | {"ratio": entry["median_us"] / bound["median_us"]})


def dense_bound(bench: Bench, setting: Setting, direction: str) -> dict[str, Any]:
    """One expert over all tokens; with one expert trained, its tokens' share of the weight gradients."""
    if direction != "visual":
        return bench.measure(_dense, setting, direction)
    without, full = (bench.measure(_dense, setting, name) for name in ("visual", "both"))
    share = setting.visual_share / 100
    return {key: without[key] + share * (full[key] - without[key]) for key in ("median_us", "min_us", "wall_us")}


def save(folder: Path, result: dict[str, Any]) -> None:
    """Writes what there is so far: a machine may be taken away at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "kernels.json.part"
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(folder / "kernels.json")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, kernels interpreted: does the script run?")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these rows (and dense)")
    parser.add_argument("--tile", type=int, default=128, help="rows per tile (default: 128)")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="default: bfloat16; float32 in a rehearsal (Triton's interpreter has no bfloat16, Mosaic GPU only that)",
    )
    parser.add_argument("--budget_s", type=float, default=1e9, help="start no new setting after so many seconds")
    parser.add_argument("--no_tune", action="store_true", help="use the tuning tables as they are")
    parser.add_argument("--readme", action="store_true", help="write the README's table from results/ and stop")
    options = parser.parse_args(arguments)
    if options.readme:
        report.write_readme()
        return 0
    if options.out is None:
        cli.fail("give --out=FOLDER for the results")
    if jax.default_backend() == "cpu" and not options.dry_run:
        cli.fail("no accelerator here: times would mean nothing; rehearse with --dry_run")

    result = run(options)
    table = tuning_json(result["device_key"], result["tuned"], result["timings"])
    (options.out / f"tuning_{result['device_key']}.json").write_text(json.dumps(table, indent=1) + "\n")
    report.plot(result, options.out)
    text = report.table(result)
    (options.out / "kernels.md").write_text(text + "\n")
    print(text)
    failed = [name for name, found in result["checks"].items() if found["failed"]]
    if options.json:
        cli.json_line({"out": str(options.out), "timings": len(result["timings"]), "failed_checks": failed, **result})
    return int(bool(failed))


if __name__ == "__main__":
    cli.run(main)
