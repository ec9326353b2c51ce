"""AdamW or Muon where attention trains, at two learning rates, and whether Muon's gain comes from S1.3 or S2."""

CONFIG = "experiments/configs/demo.py:published"


def muon(*stages, rate=1.5e-3):
    """The changes that train ``stages`` with Muon."""
    names = {f"stages.{stage}.optim.optimizer": "muon" for stage in stages}
    return names | {f"stages.{stage}.optim.learning_rate": rate for stage in stages}


def sweep(add):
    add("adamw", seeds=3)
    add("adamw_1.5e-3", {"stages.s1_3.optim.learning_rate": 1.5e-3}, seeds=3)
    add("muon_s1_3", muon("s1_3"), seeds=3)
    add("muon_s2", muon("s2"), seeds=3)
    add("muon", muon("s1_3", "s2"), seeds=3)
    add("muon_3e-3", muon("s1_3", "s2", rate=3e-3), seeds=3)
    add("muon_all", muon("s1_1", "s1_2", "s1_3", "s2"), seeds=3)
