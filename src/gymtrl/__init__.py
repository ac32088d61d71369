"""From NeMo Gym rollouts to a better model with TRL, with proof that it is better."""

__version__ = "0.1.0"
