"""The training-step benchmark: workloads, forms of the step, and how they are measured."""
