"""What fine-tuning adds to a classifier: low-rank adapters, prompts, series adapters, a coordinator."""
