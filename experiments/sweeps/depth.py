"""Number of layers of the base language model."""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    for layers in (4, 2, 8):
        add(f"layers_{layers}", {"stages.s0.model.num_hidden_layers": layers}, seeds=3)
