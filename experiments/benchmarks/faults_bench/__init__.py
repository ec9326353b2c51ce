"""The fault benchmark: a trainer in its own process, and the faults injected into it."""
