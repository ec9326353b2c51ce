"""Data for Mono-InternVL training: sources -> samples -> packing plan -> batches."""
