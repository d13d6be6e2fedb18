"""Batches and what a model says of them: samples, packed sequences, losses, labels."""
