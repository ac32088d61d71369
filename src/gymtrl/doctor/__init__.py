"""Rules that turn a run, or a comparison after it, into findings: what is wrong, why, and what to do."""
