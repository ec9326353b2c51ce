"""Modality-grouped matmuls behind one contract."""
