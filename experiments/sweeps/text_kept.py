"""What keeps the language in S2: text replayed, less of the text side trained, a lower rate for it."""

CONFIG = "experiments/configs/demo.py"

VISUAL = ["visual_embedding", "visual_experts"]


def sweep(add):
    add("published", seeds=3)
    for weight in (0.1, 0.3):
        add(f"replay_{weight}", {"replay": {"s2": {"s0": weight}}}, seeds=3)
    for name, trained in {
        "attention_only": ["attention"],
        "gate_and_up_only": ["text_experts/gate", "text_experts/up"],
        "visual_only": [],
    }.items():
        add(name, {"stages.s2.trains": [*VISUAL, *trained]}, seeds=3)
