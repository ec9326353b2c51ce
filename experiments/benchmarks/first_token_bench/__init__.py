"""The first-token benchmark: the models and their prompts, the measurements, and the report."""
