"""A NeMo Gym installation: create it, start its servers, collect rollouts from running agents."""
