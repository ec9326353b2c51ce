"""Kernels behind contracts: modality-grouped expert matmuls, packed attention."""
