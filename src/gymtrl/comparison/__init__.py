"""Paired statistics of two collections of rollouts, and the verdict."""
