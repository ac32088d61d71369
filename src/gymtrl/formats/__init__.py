"""Rollouts become the datasets that TRL trains on: rows, tokens, and which of the tokens carry loss."""
