"""Training with TRL on a dataset folder, resumable, down to a checkpoint that plain transformers loads."""
