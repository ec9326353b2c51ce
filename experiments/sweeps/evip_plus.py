"""EViP and EViP++ (visual attention experts), at equal data and at 42 % of it (Mono-InternVL-1.5)."""

CONFIG = "experiments/configs/demo.py:published"
STAGES = ("s1_1", "s1_2", "s1_3", "s2")


def sweep(add):
    stages = add.base.stages
    plus = {f"stages.{name}.stage": f"{stages[name].stage}++" for name in STAGES} | {"attention_experts": True}
    less = {f"stages.{name}.steps": round(0.42 * stages[name].steps) for name in STAGES[:3]}
    add("evip", seeds=3)
    add("evip_42", less, seeds=3)
    add("evip_plus", plus, seeds=3)
    add("evip_plus_42", plus | less, seeds=3)
