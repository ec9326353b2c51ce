"""Tokens/s of the real training step: static split, both experts on all tokens, and a plain PyTorch form.

All forms of one stage start from the same weights and see the same batch; their first losses are printed
beside the times and must agree. Forms (--forms):

  static      each expert on its own slots (the default of the models)
  dense_both  both experts on all slots, chosen by mask (the papers' naive form), logits on text slots only
  torch       experiments/benchmarks/torch_form.py: naive experts, fused attention, logits everywhere; CPU only

On the CPU the forms take turns, step by step, so that other programs disturb them alike; the median step
counts; cpu_s, the processor seconds of a step, hardly depends on what else runs (but OpenMP, which PyTorch
uses, also counts its waiting). On an accelerator the
forms run one after the other (their states need not fit together), and MFU is printed.

Presets (--preset): cpu_59m (2 rows of 448 visual and 64 text tokens, float32), mono_internvl_2b (the real
model, bfloat16, 4 rows of 3,584 and 512), tiny (a rehearsal in seconds).
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Batch, BatchSpec
from mono_jax import cli, tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh, put_batch
from mono_jax.training import optim, stages
from mono_jax.training import step as train
from mono_jax.training.flops import count_tokens, peak_flops, step_flops
from mono_jax.training.groups import trained_groups
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import init_state
from mono_jax.weights.hf_config import config_to_hf
from mono_jax.weights.writers import named_tensors

FORMS = ("static", "dense_both", "torch")
OPTIM = OptimConfig(learning_rate=1e-4, schedule="constant", warmup=0.0, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the batch it trains on: ``rows`` rows of one sample with ``visual`` and ``text`` tokens."""

    config: Architecture
    rows: int
    visual: int
    text: int
    dtype: str

    @property
    def tokens(self) -> int:
        return self.rows * (self.visual + self.text)


WORKLOADS = {
    "cpu_59m": Workload(
        Architecture(
            vocab_size=2048,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            vision=VisionConfig(hidden_size=128, image_size=224),
            visual_ffn_experts=True,
            image_token_id=2047,
        ),
        rows=2,
        visual=448,
        text=64,
        dtype="float32",
    ),
    "mono_internvl_2b": Workload(preset("mono_internvl_2b"), rows=4, visual=3584, text=512, dtype="bfloat16"),
    "tiny": Workload(preset("tiny_mono"), rows=2, visual=32, text=16, dtype="float32"),
}


def make_batch(work: Workload, seed: int = 0) -> Batch:
    """One sample per row: a BOS token, its image's tiles, then text; every text target counts."""
    config, rng = work.config, np.random.default_rng(seed)
    tile = config.vision.tile_tokens
    if work.visual % tile:
        raise ConfigError(f"--visual={work.visual}: use a multiple of the {tile} tokens of a tile")
    batch = BatchSpec(work.visual, work.text, config.vision.token_pixels).empty(work.rows)
    batch["patches"][:] = rng.integers(0, 256, batch["patches"].shape, np.uint8)
    batch["patch_cells"][:] = np.tile(np.arange(tile), work.visual // tile)
    batch["tokens"][:] = rng.integers(3, config.image_token_id, (work.rows, work.text))
    batch["targets"][:, :-1] = batch["tokens"][:, 1:]
    # The BOS token's successor is visual, the last token has none.
    batch["loss_weights"][:, 1:-1] = 1.0
    slots = np.arange(work.visual + work.text)
    batch["order"][:] = np.concatenate([[work.visual], slots[: work.visual], slots[work.visual + 1 :]])
    batch["positions"][:] = slots
    batch["segments"][:] = 1
    return batch


# ------------------------------------------------------------------ the forms


class Form(Protocol):
    """A model, its state and a batch; ``step`` runs to the end of one update and returns the loss before it."""

    def step(self) -> float: ...


class JaxForm:
    """mono_jax's own train_step, compiled for one device, state donated."""

    def __init__(self, work: Workload, params: tree.Tree, stage: stages.Stage, experts: str, remat: str, batch: Batch):
        model = Model(work.config, Execution(experts=experts, remat=remat))
        dtype = jnp.dtype(work.dtype)
        optimizer = optim.make_optimizer(stage, model.config, params, 1000, OPTIM)
        mesh = make_mesh(devices=jax.devices()[:1])
        self._state, self._frozen = init_state(stage, model, optimizer, params, dtype)
        step = train.make_train_step(model, optimizer, dtype=dtype)
        self._batch = put_batch(batch, mesh)
        jitted = train.jit_train_step(step, model, self._state, self._frozen, mesh)
        self._step = jitted.lower(self._state, self._frozen, self._batch).compile()

    def step(self) -> float:
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


class TorchForm:
    """The plain PyTorch form on the CPU with the same weights, pixels and tokens."""

    def __init__(self, work: Workload, params: tree.Tree, stage: stages.Stage, remat: str, batch: Batch):
        import torch  # OMP_NUM_THREADS says on how many cores it runs; default all

        from experiments.benchmarks.torch_form import TorchModel, TorchTrainer

        config = work.config
        tensors = {n: torch.from_numpy(np.array(t)) for n, t in named_tensors(config, params).items()}
        model = TorchModel(config_to_hf(config), tensors, image_token=config.image_token_id, remat=remat != "none")
        self._trainer = TorchTrainer(model, stage.name, OPTIM.learning_rate, weight_decay=OPTIM.weight_decay)
        first, rest = batch["tokens"][:, :1], batch["tokens"][:, 1:]
        images = np.full((work.rows, work.visual), config.image_token_id)
        unlabelled = np.full((work.rows, 2 + work.visual), -100)
        self._batch = {
            "input_ids": torch.from_numpy(np.concatenate([first, images, rest], axis=1).astype(np.int64)),
            "labels": torch.from_numpy(np.concatenate([unlabelled, rest[:, 1:]], axis=1).astype(np.int64)),
            "pixel_values": torch.from_numpy(_tiles(config, batch["patches"])),
        }

    def step(self) -> float:
        return float(self._trainer.step(**self._batch)[0])


def _tiles(config: Architecture, patches: np.ndarray) -> np.ndarray:
    """Normalised tiles float32 [N, 3, H, W] from the pixels of their tokens [B, V, P, P, 3]."""
    side, edge = config.vision.tile // config.vision.token_pixels, config.vision.token_pixels
    pixels = (patches.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    grid = pixels.reshape(-1, side, side, edge, edge, 3).transpose(0, 5, 1, 3, 2, 4)
    return np.ascontiguousarray(grid.reshape(-1, 3, side * edge, side * edge))


def build(form: str, work: Workload, params: tree.Tree, stage: stages.Stage, remat: str, batch: Batch) -> Form:
    """The form of that name, compiled and ready to step."""
    if form == "torch":
        return TorchForm(work, params, stage, remat, batch)
    return JaxForm(work, params, stage, form, remat, batch)


# ------------------------------------------------------------------ measuring


@dataclasses.dataclass
class Times:
    """Of each step after the first: wall seconds and processor seconds; ``loss`` is the first step's."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    loss: float = float("nan")


def measure(forms: dict[str, Form], steps: int) -> dict[str, Times]:
    """One warm-up step each, then ``steps`` steps each in turns."""
    times = {name: Times(loss=form.step()) for name, form in forms.items()}
    for _ in range(steps):
        for name, form in forms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            form.step()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def run_group(
    work: Workload, stage: stages.Stage, remat: str, names: Sequence[str], steps: int, seed: int
) -> list[dict[str, Any]]:
    """One result per form of a stage and remat policy."""
    batch = make_batch(work, seed)
    params = Model(work.config).init(jax.random.key(seed))
    together = jax.default_backend() == "cpu"
    times: dict[str, Times] = {}
    for group in [names] if together else [[name] for name in names]:
        forms = {name: build(name, work, params, stage, remat, batch) for name in group}
        if group[-1] == names[-1]:
            params = None  # the last group: an accelerator needs the memory
        times |= measure(forms, steps)
        del forms
        gc.collect()
    trained = trained_groups(stage, work.config)
    flops = step_flops(work.config, trained, count_tokens(batch))
    peak = peak_flops() if not together else None
    results = []
    for name, measured in times.items():
        step_s = statistics.median(measured.wall)
        results.append(
            {
                "stage": stage.name,
                "remat": remat,
                "form": name,
                "step_s": step_s,
                "best_s": min(measured.wall),
                "cpu_s": statistics.median(measured.cpu),
                "tokens_per_s": work.tokens / step_s,
                "model_tflops_per_s": flops / step_s / 1e12,
                "mfu": flops / step_s / peak if peak else None,
                "loss": measured.loss,
            }
        )
    return results


def ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster the static split is than each other form, by wall and by processor time."""
    found = []
    for ours in (r for r in results if r["form"] == "static"):
        for other in results:
            same = (other["stage"], other["remat"]) == (ours["stage"], ours["remat"])
            if same and other["form"] != "static":
                found.append(
                    {
                        "stage": ours["stage"],
                        "remat": ours["remat"],
                        "static_over": other["form"],
                        "wall": other["step_s"] / ours["step_s"],
                        "cpu": other["cpu_s"] / ours["cpu_s"],
                    }
                )
    return found


def describe(work: Workload, chosen: Sequence[str]) -> dict[str, Any]:
    """What would run, from shapes alone: parameters, and model FLOPs of a step of each stage."""
    shapes = tree.flatten(Model(work.config).abstract_params())
    counts = count_tokens(make_batch(dataclasses.replace(work, rows=1)))
    counts = {name: count * work.rows for name, count in counts.items()}
    flops = {
        name: step_flops(work.config, trained_groups(stages.get_stage(name), work.config), counts) for name in chosen
    }
    return {
        "parameters": sum(leaf.size for leaf in shapes.values()),
        "rows": work.rows,
        "visual": work.visual,
        "text": work.text,
        "dtype": work.dtype,
        "step_tflops": {name: value / 1e12 for name, value in flops.items()},
    }


# ------------------------------------------------------------------ command


def _arguments(argv: Sequence[str] | None) -> Any:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/train_step.py --json\n"
        "  python experiments/benchmarks/train_step.py --preset=mono_internvl_2b --forms static --remat full",
    )
    default = "cpu_59m" if jax.default_backend() == "cpu" else "mono_internvl_2b"
    parser.add_argument("--preset", default=default, help=f"one of {', '.join(WORKLOADS)} (default here: {default})")
    parser.add_argument("--stages", nargs="+", default=["S1.1", "S2"], help="default: S1.1 S2")
    parser.add_argument("--remat", nargs="+", default=["none", "full"], help="policies, default: none full")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each form (default 5)")
    for name in ("rows", "visual", "text"):
        parser.add_argument(f"--{name}", type=int, help=f"{name} of the batch instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch (default 0)")
    parser.add_argument("--dry_run", action="store_true", help="say what would run, from shapes alone")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return parser.parse_args(argv)


def _workload(args: Any) -> Workload:
    if args.preset not in WORKLOADS:
        raise unknown_key("preset", args.preset, WORKLOADS)
    for form in args.forms:
        if form not in FORMS:
            raise unknown_key("form", form, FORMS)
    changes = {name: getattr(args, name) for name in ("rows", "visual", "text") if getattr(args, name) is not None}
    for name, value in {**changes, "steps": args.steps}.items():
        if value < 1:
            raise ConfigError(f"--{name}={value}: it must be at least 1")
    return dataclasses.replace(WORKLOADS[args.preset], **changes)


def _usable(forms: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The forms that can run here, and why the others cannot."""
    if "torch" not in forms:
        return list(forms), {}
    if importlib.util.find_spec("torch") is None:
        reason = "PyTorch is not installed (pip install torch)"
    elif jax.default_backend() != "cpu":
        reason = "compared on the CPU only"
    else:
        return list(forms), {}
    return [form for form in forms if form != "torch"], {"torch": reason}


def _print_row(r: dict[str, Any]) -> None:
    mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
    times = f"{r['step_s']:8.3f} {r['best_s']:8.3f} {r['cpu_s']:8.3f} {r['tokens_per_s']:9.0f}"
    print(f"{r['stage']:6} {r['remat']:6} {r['form']:11} {times} {mfu:>6} {r['loss']:9.5f}", flush=True)


def measure_all(work: Workload, args: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs every stage, remat policy and form; prints one row each, then the ratios."""
    titles = f"{'step s':>8} {'best s':>8} {'cpu s':>8} {'tokens/s':>9} {'MFU':>6} {'loss':>9}"
    print(f"{'stage':6} {'remat':6} {'form':11} {titles}")
    results: list[dict[str, Any]] = []
    for stage in args.stages:
        for remat in args.remat:
            group = run_group(work, stages.get_stage(stage), remat, names, args.steps, args.seed)
            results += group
            for result in group:
                _print_row(result)
    for r in ratios(results):
        print(
            f"{r['stage']} remat {r['remat']}: static {r['wall']:.2f}x {r['static_over']}, by CPU time {r['cpu']:.2f}x"
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    work = _workload(args)
    names, left_out = _usable(args.forms)
    report: dict[str, Any] = {
        "preset": args.preset,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}",
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
        **describe(work, args.stages),
        "left_out": left_out,
        "results": [],
    }
    size = (
        f"{report['parameters'] / 1e6:.1f} M parameters, {work.rows} rows of {work.visual} visual and {work.text} text"
    )
    print(f"{args.preset}: {size} tokens, {work.dtype}; {report['device']}, load {report['load_before']:.1f}")
    for name, tflops in report["step_tflops"].items():
        print(f"{name}: {tflops:.3f} model TFLOP a step")
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")
    if not args.dry_run:
        report["results"] = measure_all(work, args, names)
    report |= {"ratios": ratios(report["results"]), "load_after": os.getloadavg()[0]}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
