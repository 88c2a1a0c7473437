"""Decides where experts live from the loads that were seen: prediction, plans of all layers, moves of owners."""
