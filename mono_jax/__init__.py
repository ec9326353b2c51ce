"""Mono-InternVL and Mono-InternVL-1.5 in JAX."""

__version__ = "0.1.0"
