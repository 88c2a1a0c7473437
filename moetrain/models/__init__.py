"""Transformers over MoE layers: the network, its initial values, and its sharding."""
