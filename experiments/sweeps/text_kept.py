"""What preserves the language: replayed text, fewer trained text parameters, or a lower learning rate for them."""

CONFIG = "experiments/configs/demo.py:published"

VISUAL = ["visual_embedding", "visual_experts"]
GATE_UP = ["text_experts/gate", "text_experts/up"]
TEXT_SIDE = ("attention", "text_experts", "norms", "token_embeddings")


def sweep(add):
    add("published", seeds=3)
    for share in (0.1, 0.3):
        add(f"replay_{share}", replayed(share), seeds=3)
    for name, trained in {"attention": ["attention"], "gate_and_up": GATE_UP, "visual": []}.items():
        both = {f"stages.{stage}.trains": [*VISUAL, *trained] for stage in ("s1_3", "s2")}
        add(f"{name}_only", both, seeds=3)
    for factor in (0.1, 0.3):
        add(f"rate_x{factor}", slowed(add.base, factor), seeds=3)
    for factor in (0.3, 0.6):
        for share in (0.15, 0.3):
            add(f"rate_x{factor}-replay_{share}", slowed(add.base, factor) | replayed(share), seeds=3)


def replayed(share):
    """A share of the samples comes from the base's own text."""
    return {"replay": {stage: {"s0": share} for stage in ("s1_3", "s2")}}


def slowed(base, factor):
    """The text side learns at a fraction of the learning rate of the visual side."""
    s1_3, s2 = (factor * base.stages[stage].optim.learning_rate for stage in ("s1_3", "s2"))
    changes = {"stages.s1_3.optim.groups": {"attention": {"learning_rate": s1_3}}}
    return changes | {"stages.s2.optim.groups": {group: {"learning_rate": s2} for group in TEXT_SIDE}}
