"""What keeps the experts evenly loaded, and what is remembered for it between steps."""
