"""What NeMo Gym wrote: one typed record a rollout, one verdict a line."""
