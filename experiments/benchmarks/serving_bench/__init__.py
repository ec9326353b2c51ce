"""Parts of ``experiments/benchmarks/serving.py``."""
