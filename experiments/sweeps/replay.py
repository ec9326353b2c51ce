"""Does replaying the base's text cost answers? The demo, which replays 3 %, and the same without replay."""

CONFIG = "experiments/configs/demo.py"


def sweep(add):
    add("demo", seeds=5)
    add("no_replay", {"replay": {}}, seeds=5)
