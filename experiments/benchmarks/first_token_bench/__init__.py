"""The first-token benchmark: the models and their prompts, what is timed, and the report."""
