"""Rules that turn a run's data, plan and metrics into findings: what is wrong, why, and what to do."""
