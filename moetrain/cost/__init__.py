"""What work and bytes cost: FLOPs, memory, link and layer times."""
