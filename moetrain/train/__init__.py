"""The training loop, optimizer, metrics."""
