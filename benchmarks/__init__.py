"""Benchmarks: speed and memory against peers, each gated by its correctness."""
