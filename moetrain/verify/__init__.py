"""Proofs that a parallelism computes what one process computes; what `moetrain verify` runs."""
