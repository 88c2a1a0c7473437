"""Writing, committing, loading and resharding checkpoints."""
