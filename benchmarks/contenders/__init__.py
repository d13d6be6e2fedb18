"""What is compared: each makes the function to measure from a workload."""
