"""What a run reports: FLOPs and MFU, the console line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

from data_pipelines.batch import boundaries
from mono_jax.errors import CheckpointError
from mono_jax.models.architecture import ModelConfig

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets; the key is part of the device's kind.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class TokenCounts(dict[str, float]):
    """Real (not padding) work of a batch: ``visual`` and ``text`` tokens, ``pairs`` of attending tokens."""


def count_tokens(batch: Mapping[str, np.ndarray]) -> TokenCounts:
    """Counts a host batch; exact, since a token at position p of its sample attends to p + 1 tokens."""
    real = batch["segments"] > 0
    visual = real & (batch["order"] < boundaries(batch)[:, None])
    pairs = (batch["positions"] + 1)[real].sum(dtype=np.int64)
    return TokenCounts(visual=int(visual.sum()), text=int(real.sum() - visual.sum()), pairs=int(pairs))


def step_flops(config: ModelConfig, trained: frozenset[str], counts: Mapping[str, float]) -> float:
    """Model FLOPs of one training step over the tokens counted.

    A matmul costs 2 FLOPs per multiply-add forward, the same again for its input's gradient, and once more for
    its weight's gradient only where its group trains. Recomputation and padding do not count.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    visual, text = counts["visual"], counts["text"]
    tokens = visual + text
    expert = 6 * d * config.intermediate_size * layers
    qkv = 2 * d * config.qkv_dim * layers

    def cost(forward: float, group: str, *, input_gradient: bool = True) -> float:
        return forward * (1 + input_gradient + (group in trained))

    own_experts = config.visual_ffn_experts
    own_qkv = config.visual_attention_experts
    total = cost(expert * text, "text_experts")
    total += cost(expert * visual, "visual_experts" if own_experts else "text_experts")
    total += cost(qkv * text, "attention") + cost(qkv * visual, "visual_attention" if own_qkv else "attention")
    total += cost(2 * d * d * layers * tokens, "attention")
    total += 3 * 4 * d * counts["pairs"] * layers  # scores and their product with v: both operands are activations
    total += cost(2 * d * config.vocab_size * text, "token_embeddings")
    if config.vision is not None:
        vision = config.vision
        shuffled = vision.hidden_size * vision.shuffle**2
        pixels = vision.token_pixels**2 * vision.num_channels
        total += cost(2 * pixels * vision.hidden_size * visual, "visual_embedding", input_gradient=False)
        total += cost(2 * (shuffled * d + d * d) * visual, "visual_embedding")
        if vision.kind == "intern_vit":
            patches = visual * vision.shuffle**2
            width = vision.hidden_size
            per_patch = 2 * width * (4 * width + 2 * vision.intermediate_size)
            total += cost(per_patch * patches * vision.num_hidden_layers, "visual_encoder")
            total += 3 * 4 * width * patches * vision.tile_tokens * vision.shuffle**2 * vision.num_hidden_layers
    return float(total)


def peak_flops(device: jax.Device | None = None, dtype: jnp.dtype = jnp.bfloat16) -> float:
    """FLOP/s that one device can do: the data sheet's number, or for other devices a matmul measured here."""
    device = device or jax.local_devices()[0]
    for name, peak in PEAK_FLOPS.items():
        if name in device.device_kind:
            return peak
    size = 1024
    x = jax.device_put(jnp.ones((size, size), jnp.float32 if device.platform == "cpu" else dtype), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    share = sum(d.platform == "cpu" for d in jax.local_devices()) if device.platform == "cpu" else 1
    return 2 * size**3 / best / share  # simulated CPU devices share the cores


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def console_line(stage: str, steps: int, record: Mapping[str, Any]) -> str:
    """One line of progress from a record of metrics.jsonl."""
    parts = [
        f"{stage} step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"MFU {record['mfu']:.1%}",
        f"data wait {record['data_wait']:.1%}",
        f"ETA {duration(record['eta_s'])}",
    ]
    if record.get("skipped"):
        parts.append(f"skipped updates {record['skipped']}")
    return "  ".join(parts)


class MetricsWriter:
    """Appends records to ``directory/metrics.jsonl`` and TensorBoard; only process 0 should have one.

    Records of steps after ``start_step`` (an interrupted run got further than its last checkpoint) are
    dropped, so that every step stands once.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= start_step]
        try:
            self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", buffering=1)
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot write metrics: {error.strerror}") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """One record with "step"; numbers also go to TensorBoard. A value that is not finite becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        for name, value in clean.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; [] if there is none. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
