"""Sweeps: one config with many changes, each a unit that is trained, evaluated and compared.

A sweep file is Python: ``CONFIG`` names the config that all units change, ``sweep(add)`` lists them.

    CONFIG = "experiments/configs/demo.py"

    def sweep(add):
        add("trained", seeds=3)
        add("frozen", {"stages.s1_3.stage": "S1.3-frozen-attention"}, seeds=3)
"""
