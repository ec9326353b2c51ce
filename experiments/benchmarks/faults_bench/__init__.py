"""The benchmark of faults: a trainer in a process of its own, and what is done to it."""
