"""How much of a model S2 has to change: everything, attention only, or low-rank adapters of two ranks."""

CONFIG = "experiments/configs/demo.py"


def sweep(add):
    add("full", {}, seeds=3)
    add("attention", {"stages.s2.trains": ["attention", "visual_embedding"]}, seeds=3)
    for rank in (4, 16):
        adapters = {"stages.s2.lora.rank": rank, "stages.s2.lora.alpha": 2.0 * rank}
        add(f"lora_{rank}", {"stages.s2.trains": ["lora", "visual_embedding"], **adapters}, seeds=3)
