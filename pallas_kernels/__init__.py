"""Kernels with contracts: modality-grouped expert matmuls and packed attention."""
