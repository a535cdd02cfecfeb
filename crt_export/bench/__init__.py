"""Measuring a bundle's targets against the memory's bandwidth and against PyTorch, in turns within one run."""
