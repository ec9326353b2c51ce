"""All of EViP in miniature: minutes on two CPU cores, on sets made from packages that pip installs.

``demo.py`` learns; ``demo.py:published`` trains the stages as the papers do, without the measures that preserve the
base's language; ``demo.py:smoke`` only shows that everything runs (a minute).
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    """The config of ``experiments/evip.py``; size "full", "published" or "smoke"."""
    if size not in ("full", "published", "smoke"):
        raise ValueError(f"demo.py:{size}: use full, published or smoke")
    config = ConfigDict()
    # Few samples are seen twice: with a third of the samples, answers are memorised (BUILD_NOTES.md).
    config.sets = ConfigDict({"kind": "demo", "seed": 0, "s1_1": 8000, "s1_2": 10_000, "s1_3": 12_000, "s2": 18_000})
    config.sets.heldout_questions = 1200  # 150 of each kind: their intervals are ± 8 points
    # 64-pixel pictures, 4 visual tokens each: one token = 2 x 2 patches of 16 pixels.
    config.vision = ConfigDict({"hidden_size": 192, "patch_size": 16, "image_size": 64})
    config.common = ConfigDict(
        {
            # Float32 throughout: on a CPU it is faster than bfloat16, and the frozen text side stays comparable.
            "dtype": "float32",
            "frozen_dtype": "float32",
            "log_every": 20,
            "checkpoint_every": 200,
            "keep": 2,
        }
    )
    rows = {"batch_size": 8, "visual_tokens": 20, "text_tokens": 140}
    config.data = ConfigDict(
        {
            "max_tiles": 1,
            "system_message": "",
            # Short rows: on a CPU, the cost of attention is quadratic in the row length, whatever the sample lengths.
            **rows,
            "block_samples": 2048,
        }
    )
    text = {"visual_tokens": 0, "text_tokens": 128, "batch_size": 12}
    instructions = {"visual_tokens": 12, "text_tokens": 160, "batch_size": 12}
    base = {"preset": "demo_lm"}
    # A few held-out rows, the same in all stages: they show what is learnt and how much language is kept.
    measured = {"every": 250, "batches": 2, "data": rows, "sources": {"text": None, "captions": None}}
    asked = {"questions": {"examples": 48, "max_new_tokens": 8, "batch_size": 48}}
    config.stages = ConfigDict(
        {
            "s0": {"stage": "S0", "steps": 450, "model": base, "data": text, "optim": {"learning_rate": 3e-3}},
            "s1_1": {"stage": "S1.1", "steps": 250, "optim": {"learning_rate": 1e-3}, "evaluation": measured},
            "s1_2": {"stage": "S1.2", "steps": 350, "optim": {"learning_rate": 1e-3}, "evaluation": measured},
            "s1_3": {"stage": "S1.3", "steps": 700, "optim": {"learning_rate": 7e-4}, "evaluation": measured},
            "s2": {
                "stage": "S2",
                "steps": 1000,
                "optim": {"learning_rate": 1.5e-3},
                "data": instructions,
                "evaluation": measured | {"tasks": asked},
            },
        }
    )
    if size != "published":
        # A little of the base's own text preserves its language (docs/findings.md).
        config.replay = {"s1_3": {"s0": 0.03}, "s2": {"s0": 0.03}}
        # Where attention trains, Muon learns more than AdamW in the same number of steps and keeps more language.
        # At less than half of this rate, most seeds do not learn shapes within S2; at 1e-2, language is lost.
        config.stages.s1_3.update({"steps": 550, "optim": {"optimizer": "muon", "learning_rate": 4e-3}})
        config.stages.s2.optim.optimizer = "muon"
    if size == "smoke":
        for name in ("s0_chat", "s1_1", "s1_2", "s1_3", "s2"):
            config.sets[name] = 200
        config.sets.text_bytes = 200_000
        config.sets.heldout_captions = config.sets.heldout_questions = 40
        for stage in config.stages.values():
            stage.steps = 4
        config.common.log_every = 1
    return config
