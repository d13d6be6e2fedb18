"""Scores of parameters: Fisher information by one backward pass a batch, and baselines."""
