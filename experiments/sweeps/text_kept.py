"""What keeps the language: text replayed, less of the text side trained, a lower rate for it."""

CONFIG = "experiments/configs/demo.py"

VISUAL = ["visual_embedding", "visual_experts"]
GATE_UP = ["text_experts/gate", "text_experts/up"]
TEXT_SIDE = ("attention", "text_experts", "norms", "token_embeddings")


def sweep(add):
    add("published", seeds=3)
    for share in (0.1, 0.3):
        add(f"replay_{share}", {"replay": {stage: {"s0": share} for stage in ("s1_3", "s2")}}, seeds=3)
    for name, trained in {"attention": ["attention"], "gate_and_up": GATE_UP, "visual": []}.items():
        both = {f"stages.{stage}.trains": [*VISUAL, *trained] for stage in ("s1_3", "s2")}
        add(f"{name}_only", both, seeds=3)
    rate = 0.1 * add.base.stages.s2.optim.learning_rate
    lower = {"stages.s1_3.optim.groups": {"attention": {"learning_rate": rate}}}
    lower |= {"stages.s2.optim.groups": {group: {"learning_rate": rate} for group in TEXT_SIDE}}
    add("lower_rate", lower, seeds=3)
    add("lower_rate-replay_0.1", lower | {"replay": {stage: {"s0": 0.1} for stage in ("s1_3", "s2")}}, seeds=3)
