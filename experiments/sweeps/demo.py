"""The demo with other seeds, and with AdamW instead of Muon: are its results chance?"""

CONFIG = "experiments/configs/demo.py"


def sweep(add):
    adamw = {"stages.s1_3.optim": {"optimizer": "adamw", "learning_rate": 7e-4}, "stages.s2.optim.optimizer": "adamw"}
    add("demo", seeds=3)
    add("adamw", adamw, seeds=3)
