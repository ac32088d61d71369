"""Which rollouts to train on, and which tasks to keep for the comparison."""
