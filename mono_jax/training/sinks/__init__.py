"""Views of the records of metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""
