"""Cluster simulator and planner of whole runs."""
