"""One stage of Mono-InternVL on shards of your own: copy this file and change it.

    mono_internvl.py:STAGE            on one machine of 8 H200
    mono_internvl.py:STAGE,MACHINE    STAGE: S1.1 S1.2 S1.3 S2 (or S1.1++ ... for 1.5); MACHINE: h200-8 v5e-16 v5p-8

    python experiments/train.py --config=experiments/configs/mono_internvl.py:S1.1,v5e-16 --workdir=runs/s1_1 \\
        --config.init=models/mono_base --config.data.tokenizer=models/mono_base \\
        --config.data.sources.laion.spec.paths='shards/*.tar'

``config.init`` is the model to start from: for the first stage, ``convert.py --embed_experts`` makes it from InternLM2;
each later stage starts from WORKDIR/model of the stage before it.
"""

from ml_collections import ConfigDict

# Maximum tiles per image (256 visual tokens each, plus a thumbnail), slots per row, and steps. Tiles follow
# Mono-InternVL's budgets of visual tokens, steps its numbers of samples at 2,048 per batch.
STAGES = {
    "S1.1": {"max_tiles": 4, "visual_tokens": 7168, "text_tokens": 1024, "steps": 450_000},
    "S1.2": {"max_tiles": 6, "visual_tokens": 7168, "text_tokens": 1024, "steps": 126_000},
    "S1.3": {"max_tiles": 12, "visual_tokens": 13_312, "text_tokens": 1024, "steps": 70_000},
    "S2": {"max_tiles": 24, "visual_tokens": 12_800, "text_tokens": 3584, "steps": 14_000},
}
# Devices that share the parameters, and what is recomputed of a layer in the backward pass; all compile for these
# machines. On one H200, S1.1 took 0.91 times as long with "none" as with "full".
MACHINES = {
    "h200-8": {"fsdp": 8, "attention": "auto", "remat": "none"},
    "v5e-16": {"fsdp": 16, "attention": "pallas_tpu", "remat": "full"},
    "v5p-8": {"fsdp": 8, "attention": "pallas_tpu", "remat": "full"},
}
BATCH_SIZE = 384  # rows: about 2,048 images in S1.1


def get_config(arg: str = "S1.1") -> ConfigDict:
    """The config of ``experiments/train.py``."""
    stage, _, machine = arg.partition(",")
    budget, device = STAGES.get(stage.removesuffix("++")), MACHINES.get(machine or "h200-8")
    if budget is None or device is None:
        raise ValueError(f"{arg!r}: use STAGE or STAGE,MACHINE of {', '.join(STAGES)}; {', '.join(MACHINES)}")
    budget = dict(budget)
    return ConfigDict(
        {
            "stage": stage,
            "init": "",  # if empty, config.model applies, with random weights
            "model": {"preset": "mono_internvl_1_5_2b" if stage.endswith("++") else "mono_internvl_2b"},
            "steps": budget.pop("steps"),
            "data": {
                "sources": [{"name": "laion", "spec": {"kind": "tar", "paths": "shards/*.tar"}}],
                "tokenizer": "models/mono_base",
                "batch_size": BATCH_SIZE,
                **budget,
            },
            "mesh": {"fsdp": device["fsdp"]},
            # One row per device at a time, logits of 512 text slots at a time.
            "grad_accum_steps": BATCH_SIZE // device["fsdp"],
            "execution": {"remat": device["remat"], "attention": device["attention"], "loss_chunk": 512},
            "checkpoint_every": 1000,
            # Losses on held-out shards, and questions (docs/evaluation_in_training.md), once sources are given, such as
            # {"captions": {"kind": "tar", "paths": "heldout/*.tar"}}.
            "evaluation": {"every": 1000, "batches": 4, "sources": {}, "tasks": {}},
        }
    )
