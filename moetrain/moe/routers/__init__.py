"""Ways to choose experts for tokens."""
